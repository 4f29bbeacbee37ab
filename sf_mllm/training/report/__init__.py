"""What runs measured, as one self-contained page."""
