"""The DINO algorithm in pieces: multi-crop forward, loss, schedules, optimisation step, drop-path and health.

Caron et al., "Emerging properties in self-supervised vision transformers", 2021 (arXiv 2104.14294).
"""
