"""Backbone and projection head: plain torch modules with the parameter names of official DINO and timm."""
