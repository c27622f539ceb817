"""Training of neural models: what a rank reads (feed), where ranks run (launch), what they do (loop)."""
