"""What a run cost and how it went: the ledger, the meters, and where their figures go."""
