"""Scripted behaviours that make data sets."""
