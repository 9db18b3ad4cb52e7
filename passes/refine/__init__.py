"""Passes that move kept weights, and masks, by gradients through more than one layer."""
