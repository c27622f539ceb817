"""What a person looks at after the night."""
