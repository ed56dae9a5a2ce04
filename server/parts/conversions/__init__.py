"""What the APIs share whose requests are converted to those of others."""
