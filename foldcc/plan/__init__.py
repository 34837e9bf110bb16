"""Everything that chooses: strategies of operators, the costs of layouts, and the search for the cheapest."""
