"""What votes teach: how certain they are."""
