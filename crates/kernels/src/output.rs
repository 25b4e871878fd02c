//! Results that several tasks write.

use std::mem::{ManuallyDrop, MaybeUninit};

/// Values of which every task writes its own; nothing is written before.
pub(crate) struct Output {
    values: Vec<MaybeUninit<f32>>,
    start: *mut f32,
}

// SAFETY: tasks only get addresses, and whoever writes to one vouches for it.
unsafe impl Sync for Output {}

impl Output {
    /// Room for `len` values.
    pub fn new(len: usize) -> Self {
        let mut values: Vec<MaybeUninit<f32>> = Vec::with_capacity(len);
        // SAFETY: these elements need no initialization.
        unsafe { values.set_len(len) };
        let start = values.as_mut_ptr().cast();
        Self { values, start }
    }

    /// Values that are there, and may be written.
    pub fn over(values: Vec<f32>) -> Self {
        let mut values = ManuallyDrop::new(values);
        let (start, len, capacity) = (values.as_mut_ptr(), values.len(), values.capacity());
        // SAFETY: the parts of a vector of the same layout, whose elements need have no values.
        let values = unsafe { Vec::from_raw_parts(start.cast(), len, capacity) };
        Self { values, start }
    }

    /// Where the value `index` is written.
    pub fn at(&self, index: usize) -> *mut f32 {
        self.start.wrapping_add(index)
    }

    /// The values.
    ///
    /// # Safety
    /// All of them have been written.
    pub unsafe fn done(self) -> Vec<f32> {
        let mut values = ManuallyDrop::new(self.values);
        let (start, len, capacity) = (values.as_mut_ptr(), values.len(), values.capacity());
        // SAFETY: the parts of a vector of the same layout, whose elements have values.
        unsafe { Vec::from_raw_parts(start.cast(), len, capacity) }
    }
}
