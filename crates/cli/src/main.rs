//! The oxiformers command.

fn main() {}
