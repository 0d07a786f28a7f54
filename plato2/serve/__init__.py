"""Serving a trained model over HTTP: requests, who may ask, one queue for all, the web page."""
