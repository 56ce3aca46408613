"""Ranks: their places (mesh) and how they speak (collectives)."""
