"""Banks of experts, found by what they compute: tensors read as formulas, normal forms, matching, writing back."""
