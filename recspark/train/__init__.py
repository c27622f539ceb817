"""Training of neural models: what ranks read (feed), where they run (launch), what they do."""
