"""Training of editors and text-to-image models."""
