"""Policies that learned online, in a folder for each body, with what made them."""
