"""Training with Lightning: manual optimization, any update rule."""
