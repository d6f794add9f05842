"""One YAML a row of a paper: docs/recipes.md."""
