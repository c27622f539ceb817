"""All models, behind one contract: `base` defines the contract, `registry` lists the models."""
