"""Preparation of text, images, chat messages and input lines for the stem."""
