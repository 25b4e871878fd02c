//! Memory that vectors and tiles read in whole cache lines.

/// So many bytes before their turn weights are asked for where several rows are multiplied: what the processor does by
/// itself ends with a page of 4 KB.
pub(crate) const AHEAD: usize = 2048;

/// 64 bytes of numbers of any kind, aligned.
#[derive(Clone, Copy)]
#[repr(align(64))]
pub(crate) struct Line(#[allow(dead_code)] [u8; 64]);

impl Default for Line {
    fn default() -> Self {
        Self([0; 64])
    }
}

/// Makes room for at least so many values, of which those that were there before stay what they are.
pub(crate) fn make_room<T: Copy + Default>(values: &mut Vec<T>, len: usize) {
    if values.len() < len {
        values.resize(len, T::default());
    }
}
