"""What is read while training and evaluating: sources, streams, order, the loader. Imports images, text and scenes."""
