"""What becomes of text, images, chat messages and input lines before the stem reads them."""
