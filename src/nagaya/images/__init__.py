"""Images: names, manifests, blobs, layers; sources that they come from and sinks that they go to."""
