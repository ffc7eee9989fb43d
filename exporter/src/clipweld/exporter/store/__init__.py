"""The model repository on disk: versions, their manifests and cards, and the store that keeps every one of them."""
