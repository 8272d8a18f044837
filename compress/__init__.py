"""A trained model in, a dense smaller model out."""
