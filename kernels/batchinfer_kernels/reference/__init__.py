"""Plain torch: what every op means, vectorised over sequences."""
