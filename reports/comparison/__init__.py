"""The page that shows two sides of a comparison: aligned timelines, distributions, and a differential flame graph."""
