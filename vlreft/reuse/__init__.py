"""What never changes and runs once: prefixes, image features, and questions behind one prefix."""
