//! Memory that weights lie in.
//!
//! A product reads weights once and in order, so that every few kilobytes the processor has to find out where the next
//! page is. On Linux, weights therefore lie in pages of two megabytes, many matrices side by side: no matrix is a whole
//! number of these. Elsewhere, and where the system has none, they are vectors.

use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicBool, Ordering};

use crate::lines::Line;

static LARGE_PAGES: AtomicBool = AtomicBool::new(true);

/// Whether weights that are loaded from now on may lie in large pages, past the process's allocator; they do at first.
/// Without them decoding takes a tenth longer, and no memory is held in pieces of 16 megabytes.
pub fn set_large_pages(wanted: bool) {
    LARGE_PAGES.store(wanted, Ordering::Relaxed);
}

/// Bytes from the beginning of a cache line on.
pub(crate) struct Bytes {
    len: usize,
    place: Place,
}

enum Place {
    Lines(Vec<Line>),
    #[cfg(target_os = "linux")]
    Large(large::Part),
}

impl Bytes {
    /// Zeros that stay for long, in large pages where there are such.
    pub fn zeroed(len: usize) -> Self {
        #[cfg(target_os = "linux")]
        if LARGE_PAGES.load(Ordering::Relaxed)
            && let Some(part) = large::zeroed(len.next_multiple_of(size_of::<Line>()))
        {
            let place = Place::Large(part);
            return Self { len, place };
        }
        Self::temporary(len)
    }

    /// Zeros that are soon given back.
    pub fn temporary(len: usize) -> Self {
        let lines = vec![Line::default(); len.div_ceil(size_of::<Line>())];
        let place = Place::Lines(lines);
        Self { len, place }
    }

    fn start(&self) -> *const u8 {
        match &self.place {
            Place::Lines(lines) => lines.as_ptr().cast(),
            #[cfg(target_os = "linux")]
            Place::Large(part) => part.start(),
        }
    }
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: there are as many bytes at least, which nothing but `deref_mut` changes.
        unsafe { std::slice::from_raw_parts(self.start(), self.len) }
    }
}

impl DerefMut for Bytes {
    fn deref_mut(&mut self) -> &mut [u8] {
        let start = match &mut self.place {
            Place::Lines(lines) => lines.as_mut_ptr().cast(),
            #[cfg(target_os = "linux")]
            Place::Large(part) => part.start().cast_mut(),
        };
        // SAFETY: there are as many bytes at least, and they are lent out by this alone.
        unsafe { std::slice::from_raw_parts_mut(start, self.len) }
    }
}

#[cfg(target_os = "linux")]
mod large {
    use std::sync::{Arc, Mutex, Weak};

    use memmap2::{Advice, MmapMut};

    /// A large page.
    const PAGE: usize = 2 << 20;
    /// What matrices share: so much stays at most for one that is left of them.
    const CHUNK: usize = 8 * PAGE;

    /// The chunk that is being filled, and how far it is.
    static FILLING: Mutex<(Weak<Chunk>, usize)> = Mutex::new((Weak::new(), 0));

    struct Chunk {
        /// Keeps the memory.
        _map: MmapMut,
        /// The address of its first byte, a multiple of [`PAGE`].
        start: *mut u8,
    }

    // SAFETY: the bytes are only reached through parts, none of which has those of another.
    unsafe impl Send for Chunk {}
    // SAFETY: the same.
    unsafe impl Sync for Chunk {}

    /// Some bytes of a chunk.
    pub(super) struct Part {
        chunk: Arc<Chunk>,
        at: usize,
    }

    impl Part {
        pub fn start(&self) -> *const u8 {
            self.chunk.start.wrapping_add(self.at)
        }
    }

    /// `len` zeros; `None` where the system has no such memory. What is larger than a chunk has one of its own.
    pub(super) fn zeroed(len: usize) -> Option<Part> {
        if len > CHUNK {
            let chunk = Arc::new(map(len)?);
            return Some(Part { chunk, at: 0 });
        }
        let mut filling = FILLING.lock().ok()?;
        let (chunk, at) = match filling.0.upgrade() {
            Some(chunk) if filling.1 + len <= CHUNK => (chunk, filling.1),
            _ => {
                let chunk = Arc::new(map(CHUNK)?);
                filling.0 = Arc::downgrade(&chunk);
                (chunk, 0)
            }
        };
        filling.1 = at + len;
        Some(Part { chunk, at })
    }

    fn map(len: usize) -> Option<Chunk> {
        // What is before the first whole page is never touched, and takes no memory.
        let mut map = MmapMut::map_anon(len.checked_add(PAGE)?).ok()?;
        map.advise(Advice::HugePage).ok()?;
        let start = map.as_mut_ptr();
        let start = start.wrapping_add(start.align_offset(PAGE));
        Some(Chunk { _map: map, start })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_zeros_of_their_own() {
        let sizes = [0, 1, 63, 64, 65, 5 << 20, 9 << 20, 3, 17 << 20, 100];
        let mut all: Vec<Bytes> = sizes
            .into_iter()
            .flat_map(|len| [Bytes::zeroed(len), Bytes::temporary(len)])
            .collect();
        for (index, bytes) in all.iter_mut().enumerate() {
            assert_eq!((bytes.len(), bytes.as_ptr().addr() % 64), (sizes[index / 2], 0));
            assert!(bytes.iter().all(|byte| *byte == 0));
            bytes.fill(index as u8 + 1);
        }
        let last = all.pop().unwrap();
        for (index, bytes) in all.iter().enumerate() {
            assert!(bytes.iter().all(|byte| *byte == index as u8 + 1));
        }
        drop(all);
        assert!(last.iter().all(|byte| *byte == 20));
        assert!(Bytes::zeroed(1 << 20).iter().all(|byte| *byte == 0));
    }
}
