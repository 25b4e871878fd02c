//! Memory that vectors and tiles read in whole cache lines.

/// 64 bytes of numbers of any kind, aligned.
#[derive(Clone, Copy)]
#[repr(align(64))]
pub(crate) struct Line(#[allow(dead_code)] [u8; 64]);

impl Line {
    pub const ZERO: Self = Self([0; 64]);
}

/// Makes room for at least so many lines.
pub(crate) fn make_room(lines: &mut Vec<Line>, len: usize) {
    if lines.len() < len {
        lines.resize(len, Line::ZERO);
    }
}
