//! Broken and hostile checkpoints of every container: an error that names the file each time, no panic, and
//! no more memory than the file's length allows.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use oxiformers_hub::checkpoint::Checkpoint;
use oxiformers_hub::{ModelFiles, Result};
use proptest::prelude::*;

/// Counts the bytes that the current thread holds.
struct Counting;

thread_local! {
    static HELD: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

fn count(bytes: isize) {
    let held = HELD.get() + bytes;
    HELD.set(held);
    PEAK.set(PEAK.get().max(held));
}

// SAFETY: everything is handed on to the system's allocator; counting does not allocate.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(block, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The most bytes held at a time while `f` ran.
fn peak<T>(f: impl FnOnce() -> T) -> (T, usize) {
    let before = HELD.get();
    PEAK.set(before);
    let result = f();
    (result, (PEAK.get() - before) as usize)
}

/// Room for a tensor that repeats its values, and for a pickle's names.
const MIB: usize = 1 << 20;
const LIMIT: usize = 160 * MIB;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/checkpoints")
}

/// Valid files, one container each.
const SAFETENSORS: &[&str] = &["dtypes.safetensors"];
const GGUF: &[&str] = &["v3.gguf", "v2.gguf"];
const TORCH: &[&str] = &[
    "dtypes.zip.bin",
    "dtypes.legacy.bin",
    "strided.zip.bin",
    "strided.legacy.bin",
    "shared.zip.pt",
    "parameters.legacy.pth",
    "nested.zip.pt",
    "nested.legacy.pt",
    "lightning.zip.ckpt",
    "protocol4.zip.pt",
    "protocol5.zip.pt",
];

fn fixture(name: &str) -> Vec<u8> {
    std::fs::read(fixtures().join(name)).unwrap()
}

/// Opens a file and reads every tensor, within `limit` bytes. The names and contents, or an error that names
/// the file.
fn read_within(name: &str, bytes: Vec<u8>, limit: usize) -> Result<Vec<(String, Bytes)>> {
    let files = ModelFiles::from_memory("model", [(name.to_string(), Bytes::from(bytes))]);
    let (result, peak) = peak(|| {
        let checkpoint = Checkpoint::open(&files)?;
        let mut all = Vec::new();
        for info in checkpoint.tensors() {
            let view = checkpoint.tensor(&info.name)?;
            assert_eq!(Some(view.data.len()), view.dtype.num_bytes(&view.shape), "{name}");
            // Large ones are read and let go, one at a time.
            let len = view.data.len();
            all.push((
                info.name.clone(),
                if len < MIB { view.data } else { Bytes::new() },
            ));
        }
        Ok(all)
    });
    assert!(peak <= limit, "{name}: {peak} bytes were held");
    if let Err(error) = &result {
        let message: &oxiformers_hub::Error = error;
        assert!(message.to_string().contains(name), "{name}: {message}");
    }
    result
}

fn read(name: &str, bytes: Vec<u8>) -> Result<Vec<(String, Bytes)>> {
    read_within(name, bytes, LIMIT)
}

fn refused(name: &str, bytes: Vec<u8>, reason: &str) {
    match read(name, bytes) {
        Ok(_) => panic!("{name} was read: {reason}"),
        Err(error) => {
            let message = error.to_string();
            assert!(message.contains(reason), "{reason}: {message}");
        }
    }
}

#[test]
fn files_cut_anywhere() {
    for name in SAFETENSORS.iter().chain(GGUF).chain(TORCH) {
        let whole = fixture(name);
        let expected = read(name, whole.clone()).unwrap();
        for len in 0..whole.len() {
            // The padding behind the last tensor of a GGUF may be missing.
            if let Ok(tensors) = read(name, whole[..len].to_vec()) {
                assert!(
                    name.ends_with(".gguf") && whole.len() - len < 32,
                    "{name} at {len}"
                );
                assert_eq!(tensors, expected);
            }
        }
    }
}

#[test]
fn every_field_overwritten() {
    let patterns: [&[u8]; 5] = [
        &[0xff; 8],
        &[0, 0, 0, 0, 0, 0, 0, 0x80],
        &[0xff, 0xff, 0xff, 0x7f],
        &[0, 0, 0, 0],
        &[0xff],
    ];
    for name in SAFETENSORS.iter().chain(GGUF).chain(TORCH) {
        let whole = fixture(name);
        for pattern in patterns {
            for at in 0..whole.len().saturating_sub(pattern.len()) {
                let mut bytes = whole.clone();
                bytes[at..at + pattern.len()].copy_from_slice(pattern);
                let _ = read(name, bytes);
            }
        }
    }
}

#[test]
fn hostile_pickles_take_little_memory() {
    for entry in std::fs::read_dir(fixtures()).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        if name.starts_with("hostile.") {
            assert!(read(&name, fixture(&name)).is_err(), "{name}");
        }
    }
}

/// A pickle of nothing but opcodes that make something: memory stays within what the limit of steps allows.
#[test]
fn endless_pickles() {
    for opcode in [b']', b'}', b'(', b'N', b')', 0x8f] {
        let bytes = legacy(&[&[0x80, 2][..], &vec![opcode; 5 << 20]].concat());
        let error = read_within("m.bin", bytes, 512 * MIB).unwrap_err().to_string();
        assert!(error.contains("steps"), "{error}");
    }
}

mod safetensors {
    use super::*;

    fn file(header: &str, data: usize) -> Vec<u8> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.resize(bytes.len() + data, 0);
        bytes
    }

    fn tensor(name: &str, dtype: &str, shape: &str, from: &str, to: &str) -> String {
        format!(r#""{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{from},{to}]}}"#)
    }

    #[test]
    fn headers() {
        let name = "model.safetensors";
        let one = tensor("w", "F32", "[2]", "0", "8");
        assert!(read(name, file(&format!("{{{one}}}"), 8)).is_ok());
        for len in [9, 1 << 40, 1 << 63, u64::MAX, u64::MAX - 7] {
            let mut bytes = len.to_le_bytes().to_vec();
            bytes.extend(b"{}");
            refused(name, bytes, "eader");
        }
        let next = |from, to| tensor("v", "F32", "[2]", from, to);
        for (inside, data, reason) in [
            (format!("{one},{one}"), 8, "`w` is stored twice"),
            (format!("{one},{}", tensor("w", "F32", "[2]", "8", "16")), 16, ""),
            (format!("{one},{}", next("4", "12")), 12, "offset"),
            (format!("{one},{}", next("0", "8")), 8, "offset"),
            (format!("{one},{}", next("12", "20")), 20, "offset"),
            (format!("{one},{}", next("16", "8")), 16, ""),
            (one.clone(), 7, ""),
            (one.clone(), 9, ""),
            (tensor("w", "F32", "[2]", "0", "9223372036854775808"), 8, ""),
            (tensor("w", "F32", "[2]", "18446744073709551608", "0"), 8, ""),
            (tensor("w", "F32", "[4611686018427387904,4]", "0", "0"), 0, ""),
            (tensor("w", "F32", "[9223372036854775808,0]", "0", "0"), 8, ""),
            (tensor("w", "F32", "[3]", "0", "8"), 8, ""),
            (tensor("w", "F32", "[-2]", "0", "8"), 8, ""),
            (tensor("w", "F31", "[2]", "0", "8"), 8, "F31"),
            (tensor("w", "F8_E8M0", "[8]", "0", "8"), 8, "F8_E8M0"),
            (
                r#""w":{"dtype":"F32","shape":"#.to_string() + &"[".repeat(100_000),
                8,
                "",
            ),
            (r#""w":"#.to_string() + &r#"{"a":"#.repeat(100_000), 8, ""),
            (r#""w":3"#.to_string(), 8, ""),
            (String::new(), 8, ""),
        ] {
            refused(name, file(&format!("{{{inside}}}"), data), reason);
        }
        refused(name, file("[]", 0), "");
        refused(name, file("\u{feff}{}", 0), "");
    }
}

mod gguf {
    use super::*;

    /// A file under construction.
    #[derive(Clone)]
    struct File(Vec<u8>);

    impl File {
        fn new(tensors: u64, pairs: u64) -> Self {
            Self(b"GGUF".to_vec()).u32(3).u64(tensors).u64(pairs)
        }

        fn bytes(mut self, bytes: &[u8]) -> Self {
            self.0.extend(bytes);
            self
        }

        fn u32(self, n: u32) -> Self {
            self.bytes(&n.to_le_bytes())
        }

        fn u64(self, n: u64) -> Self {
            self.bytes(&n.to_le_bytes())
        }

        fn text(self, text: &str) -> Self {
            self.u64(text.len() as u64).bytes(text.as_bytes())
        }

        /// An F32 vector of 8.
        fn tensor(self, name: &str, offset: u64) -> Self {
            self.text(name).u32(1).u64(8).u32(0).u64(offset)
        }

        fn data(mut self, len: usize) -> Vec<u8> {
            self.0.resize(self.0.len().next_multiple_of(32) + len, 0);
            self.0
        }
    }

    #[test]
    fn fields() {
        let name = "m.gguf";
        let huge = [1 << 63, u64::MAX, 1 << 40];
        assert_eq!(
            read(name, File::new(1, 0).tensor("w", 0).data(32)).unwrap().len(),
            1
        );
        assert_eq!(read(name, File::new(0, 0).data(0)).unwrap().len(), 0);
        refused(name, b"GGUE".to_vec(), "no GGUF file");
        for (version, reason) in [
            (1, "version 1"),
            (4, "version 4"),
            (3 << 24, "big-endian"),
            (0, "version 0"),
        ] {
            refused(
                name,
                File(b"GGUF".to_vec()).u32(version).u64(0).u64(0).data(0),
                reason,
            );
        }
        for n in huge {
            refused(name, File::new(n, 0).tensor("w", 0).data(32), "");
            refused(name, File::new(0, n).data(0), "");
            refused(name, File::new(0, 1).u64(n).bytes(b"key").data(0), "metadata key");
            refused(name, File::new(0, 1).text("key").u32(8).u64(n).data(64), "`key`");
            for ty in 0..=13 {
                refused(
                    name,
                    File::new(0, 1).text("key").u32(9).u32(ty).u64(n).data(64),
                    "",
                );
            }
            refused(name, File::new(1, 0).u64(n).data(64), "tensor name");
            refused(
                name,
                File::new(1, 0).text("w").u32(1).u64(n).u32(0).u64(0).data(64),
                "`w`",
            );
            refused(
                name,
                File::new(1, 0)
                    .text("w")
                    .u32(2)
                    .u64(n)
                    .u64(n)
                    .u32(0)
                    .u64(0)
                    .data(64),
                "`w`",
            );
            refused(
                name,
                File::new(1, 0)
                    .text("w")
                    .u32(2)
                    .u64(n)
                    .u64(32)
                    .u32(2)
                    .u64(0)
                    .data(64),
                "`w`",
            );
            refused(name, File::new(1, 0).tensor("w", n).data(32), "`w`");
        }
        for (file, reason) in [
            (File::new(1, 0).text("w").u32(u32::MAX), "dimensions"),
            (File::new(1, 0).text("w").u32(1).u64(8).u32(16).u64(0), "IQ2_XXS"),
            (
                File::new(1, 0).text("w").u32(1).u64(8).u32(u32::MAX).u64(0),
                "4294967295",
            ),
            (
                File::new(1, 0).text("w").u32(1).u64(8).u32(2).u64(0),
                "Q4_0 cannot hold",
            ),
            (File::new(1, 0).text("w").u32(0).u32(2).u64(0), "Q4_0 cannot hold"),
            (File::new(1, 0).tensor("w", 4), "no multiple"),
            (File::new(1, 0).tensor("w", 64), "cut short"),
            (File::new(2, 0).tensor("w", 0).tensor("v", 0), "overlap"),
            (File::new(2, 0).tensor("w", 0).tensor("w", 32), "stored twice"),
            (File::new(0, 1).text("key").u32(13), "unknown type"),
            (
                File::new(0, 2)
                    .text("key")
                    .u32(4)
                    .u32(0)
                    .text("key")
                    .u32(4)
                    .u32(0),
                "twice",
            ),
        ] {
            refused(name, file.data(64), reason);
        }
        for alignment in [0, 3, 1 << 31] {
            let file = File::new(1, 1)
                .text("general.alignment")
                .u32(4)
                .u32(alignment)
                .tensor("w", 0);
            refused(name, file.data(64), "general.alignment");
        }
        refused(
            name,
            File::new(0, 1)
                .text("general.alignment")
                .u32(8)
                .text("32")
                .data(0),
            "general.alignment",
        );
    }

    #[test]
    fn nested_arrays() {
        let name = "m.gguf";
        let nested = |depth| {
            let file = File::new(0, 1).text("key").u32(9);
            (0..depth)
                .fold(file, |file, _| file.u32(9).u64(1))
                .u32(4)
                .u64(0)
                .data(0)
        };
        assert!(read(name, nested(4)).is_ok());
        refused(name, nested(5), "`key`");
        refused(name, nested(100_000), "`key`");
        // Many empty arrays, none of which takes more than its own header.
        let wide = File::new(0, 1).text("key").u32(9).u32(9).u64(10_000);
        let wide = (0..10_000).fold(wide, |file, _| file.u32(8).u64(0)).data(0);
        let limit = 16 * wide.len();
        assert!(read_within(name, wide, limit).is_ok());
    }

    #[test]
    fn splits() {
        let part = |name: &str, tensor: &str| {
            (
                name.to_string(),
                Bytes::from(File::new(1, 0).tensor(tensor, 0).data(32)),
            )
        };
        let open = |parts: [(String, Bytes); 2]| Checkpoint::open(&ModelFiles::from_memory("model", parts));
        let (one, two) = ("m-00001-of-00002.gguf", "m-00002-of-00002.gguf");
        assert_eq!(
            open([part(one, "a"), part(two, "b")]).unwrap().tensors().count(),
            2
        );
        let error = open([part(one, "a"), part(two, "a")]).err().unwrap().to_string();
        assert!(error.contains(two) && error.contains("stored twice"), "{error}");
        for total in ["00000", "4294967295", "10000"] {
            let name = format!("m-00001-of-{total}.gguf");
            refused(&name, File::new(0, 0).data(0), "not plausible");
        }
    }
}

/// Changes to a valid file: bytes replaced, a stretch copied elsewhere, bytes taken out, the end cut off.
fn mutated(names: &'static [&'static str]) -> impl Strategy<Value = (&'static str, Vec<u8>)> {
    let place = any::<prop::sample::Index>;
    let byte = prop_oneof![
        any::<u8>(),
        Just(0xff),
        Just(0),
        Just(0x80),
        Just(b'.'),
        Just(b'R'),
        Just(b'q')
    ];
    (
        prop::sample::select(names),
        prop::collection::vec((place(), byte), 0..12),
        prop::option::weighted(0.3, (place(), place(), 1usize..64)),
        prop::option::weighted(0.3, (place(), 1usize..16)),
        prop::option::weighted(0.2, place()),
    )
        .prop_map(|(name, flips, copied, removed, end)| {
            let mut bytes = fixture(name);
            for (at, byte) in flips {
                let at = at.index(bytes.len());
                bytes[at] = byte;
            }
            if let Some((from, to, len)) = copied {
                let from = from.index(bytes.len());
                let stretch = bytes[from..(from + len).min(bytes.len())].to_vec();
                let to = to.index(bytes.len());
                bytes.splice(to..to, stretch);
            }
            if let Some((from, len)) = removed {
                let from = from.index(bytes.len());
                let to = (from + len).min(bytes.len());
                bytes.drain(from..to);
            }
            if let Some(end) = end {
                bytes.truncate(end.index(bytes.len() + 1));
            }
            (name, bytes)
        })
}

/// The older format around any pickle.
fn legacy(pickle: &[u8]) -> Vec<u8> {
    let whole = fixture("hostile.legacy.bin");
    let object = whole.windows(5).position(|window| window == b"posix").unwrap();
    // The object begins with its protocol, a dict and the key `w`.
    let start = whole[..object]
        .windows(3)
        .rposition(|window| window == b"\x80\x02}")
        .unwrap();
    let mut bytes = whole[..start].to_vec();
    bytes.extend(pickle);
    bytes.extend(b"\x80\x02]q\x00X\x01\0\0\x000a.\x04\0\0\0\0\0\0\0");
    bytes.extend([0; 16]);
    bytes
}

/// Pickles of opcodes that make some sense together.
fn pickles() -> impl Strategy<Value = Vec<u8>> {
    let tensor = b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuM\x04\0tQK\0K\x02K\x02\x86K\x02K\x01\x86\x89}tR";
    let words: Vec<&'static [u8]> = vec![
        b"(",
        b"0",
        b"1",
        b"2",
        b"N",
        b"\x88",
        b"K\x02",
        b"M\x04\0",
        b"J\xff\xff\xff\xff",
        b"X\x01\0\0\0w",
        b"X\x01\0\0\0v",
        b")",
        b"]",
        b"}",
        b"\x8f",
        b"t",
        b"l",
        b"d",
        b"\x85",
        b"\x86",
        b"\x87",
        b"a",
        b"e",
        b"s",
        b"u",
        b"\x90",
        b"\x91",
        b"q\0",
        b"q\x01",
        b"h\0",
        b"h\x01",
        b"\x94",
        b"Q",
        b"R",
        b"b",
        b"ctorch._utils\n_rebuild_tensor_v2\n",
        b"ctorch._utils\n_rebuild_parameter\n",
        b"ccollections\nOrderedDict\n",
        b"ctorch\nSize\n",
        tensor,
        tensor,
        tensor,
    ];
    prop::collection::vec(prop::sample::select(words), 0..60)
        .prop_map(|words| [b"\x80\x02".as_slice(), &words.concat(), b"."].concat())
}

#[test]
fn the_older_format_around_a_pickle() {
    let tensor = b"\x80\x02}X\x01\0\0\0wctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuM\x04\0tQK\0K\x02K\x02\x86K\x02K\x01\x86\x89}tRs.";
    assert_eq!(read("m.bin", legacy(tensor)).unwrap()[0].0, "w");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn mutated_safetensors((name, bytes) in mutated(SAFETENSORS)) {
        let limit = MIB + 64 * bytes.len();
        let _ = read_within(name, bytes, limit);
    }

    #[test]
    fn mutated_gguf((name, bytes) in mutated(GGUF)) {
        let limit = MIB + 64 * bytes.len();
        let _ = read_within(name, bytes, limit);
    }

    #[test]
    fn mutated_torch((name, bytes) in mutated(TORCH)) {
        let _ = read(name, bytes);
    }

    #[test]
    fn any_pickle(pickle in pickles()) {
        let _ = read("m.bin", legacy(&pickle));
    }

    #[test]
    fn any_bytes(bytes in prop::collection::vec(any::<u8>(), 0..200), start in 0usize..4) {
        let start: &[u8] = [b"".as_slice(), b"GGUF\x03\0\0\0", b"PK\x03\x04", b"\x80\x02"][start];
        for name in ["m.gguf", "m.safetensors", "m.bin"] {
            prop_assert!(read(name, [start, &bytes].concat()).is_err());
        }
    }
}
