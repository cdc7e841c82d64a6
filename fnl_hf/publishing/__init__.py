"""Model cards, and uploads to the Hub."""
