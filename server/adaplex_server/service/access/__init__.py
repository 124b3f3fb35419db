"""Who may do what, and how much of it: API keys, the policy of every route, and rates."""
