"""Quality on published protocols, one command each."""
