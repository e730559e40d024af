"""What the tests share: the float64 oracle, input generators, comparisons and the wings under test."""
