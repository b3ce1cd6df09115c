"""What training takes in memory, and where it is."""
