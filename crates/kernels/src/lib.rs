//! Fused operators: a reference for every device, fast versions where they pay.
