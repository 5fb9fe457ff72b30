"""The face of a loaded model (`face.LoadedModel`), one file an ability; evaluators run the same compiled functions."""
