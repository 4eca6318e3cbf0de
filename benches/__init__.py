"""Side by side with the neighbours, in one run: ratios and medians, not seconds."""
