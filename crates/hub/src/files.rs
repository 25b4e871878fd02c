use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

#[cfg(not(target_arch = "wasm32"))]
use std::path::{Path, PathBuf};

use bytes::Bytes;
use serde::de::DeserializeOwned;

use crate::checkpoint::gguf::{GgufFile, Metadata};
use crate::{Error, Result};

/// Folders nested deeper than this are not part of a model.
#[cfg(not(target_arch = "wasm32"))]
const MAX_DEPTH: usize = 6;

/// More files than this are not one model: somebody named the wrong folder.
#[cfg(not(target_arch = "wasm32"))]
const MAX_FILES: usize = 100_000;

/// Smaller files are read, larger ones mapped.
#[cfg(not(target_arch = "wasm32"))]
const MAP_FROM: u64 = 64 << 10;

/// The files of one model: a folder, a single file, or bytes in memory (the browser).
///
/// Cloning is cheap. Large files are memory-mapped where the platform can, so [`ModelFiles::get`] costs no
/// copy, and slices of the [`Bytes`] keep the mapping alive.
#[derive(Clone, Debug)]
pub struct ModelFiles {
    name: Arc<str>,
    files: Arc<BTreeMap<String, Entry>>,
    /// The GGUF's header, once it was asked for: weights, tokenizer and template all begin there.
    gguf: Arc<OnceLock<GgufFile>>,
}

#[derive(Debug, Clone)]
enum Entry {
    #[cfg(not(target_arch = "wasm32"))]
    Path(PathBuf),
    Memory(Bytes),
}

impl ModelFiles {
    /// All files of a folder and of the folders in it (hidden ones left out; links to folders are not
    /// followed).
    ///
    /// # Errors
    /// [`Error::Io`] when the folder cannot be listed.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn from_dir(path: &Path) -> Result<Self> {
        let mut files = BTreeMap::new();
        walk(path, "", MAX_DEPTH, &mut files)?;
        Ok(Self::new(path.display().to_string(), files))
    }

    /// A single `.gguf`, `.safetensors` or `.bin`; the files beside it are not included.
    ///
    /// # Errors
    /// [`Error::Io`] when there is no such file, [`Error::Format`] when the path is not a file with a name.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn from_file(path: &Path) -> Result<Self> {
        let shown = path.display().to_string();
        if !path.metadata().map_err(Error::io(path))?.is_file() {
            return Err(Error::format(shown, "is not a file"));
        }
        let Some(name) = path.file_name().and_then(|name| name.to_str()) else {
            return Err(Error::format(
                shown,
                "the file name is not valid UTF-8; rename it",
            ));
        };
        Ok(Self::new(
            shown,
            BTreeMap::from([(name.to_owned(), Entry::Path(path.to_path_buf()))]),
        ))
    }

    /// The files of `paths`, each under the relative name it is to be known by.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn from_paths(name: &str, paths: impl IntoIterator<Item = (String, PathBuf)>) -> Self {
        let files = paths
            .into_iter()
            .map(|(name, path)| (name, Entry::Path(path)))
            .collect();
        Self::new(name.to_owned(), files)
    }

    /// Files that are already in memory, by their relative names with `/`.
    pub fn from_memory(name: &str, files: impl IntoIterator<Item = (String, Bytes)>) -> Self {
        let files = files
            .into_iter()
            .map(|(name, bytes)| (name, Entry::Memory(bytes)))
            .collect();
        Self::new(name.to_owned(), files)
    }

    fn new(name: String, files: BTreeMap<String, Entry>) -> Self {
        Self {
            name: name.into(),
            files: Arc::new(files),
            gguf: Arc::default(),
        }
    }

    /// The same files, of which `name` is replaced or added.
    #[must_use]
    pub fn with_file(&self, name: &str, bytes: Bytes) -> Self {
        let mut files = self.files.as_ref().clone();
        files.insert(name.to_owned(), Entry::Memory(bytes));
        Self::new(self.name.to_string(), files)
    }

    /// The same files under another name for messages.
    #[must_use]
    pub fn named(mut self, name: &str) -> Self {
        self.name = name.into();
        self
    }

    /// These files, with those of `other` that `take` says yes to in the place of files of the same names.
    #[must_use]
    pub fn overlaid(&self, other: &Self, take: impl Fn(&str) -> bool) -> Self {
        let mut files = (*self.files).clone();
        let taken = other.files.iter().filter(|(name, _)| take(name));
        files.extend(taken.map(|(name, entry)| (name.clone(), entry.clone())));
        Self::new(self.name.to_string(), files)
    }

    /// The files of a folder within these, as a model of their own; all of them where `place` is empty.
    #[must_use]
    pub fn folder(&self, place: &str) -> Self {
        let place = place.trim_matches('/');
        if matches!(place, "" | ".") {
            return self.clone();
        }
        let prefix = format!("{place}/");
        let files = (self.files.iter())
            .filter_map(|(name, entry)| Some((name.strip_prefix(&prefix)?.to_owned(), entry.clone())))
            .collect();
        Self::new(format!("{}/{place}", self.name), files)
    }

    /// What the model is called in messages: the path, the repository or the package.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The relative names of all files, with `/`, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.files.keys().map(String::as_str)
    }

    /// True when there is a file of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.files.contains_key(name)
    }

    /// Where a file lies, if it is not in memory.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn path(&self, name: &str) -> Option<&Path> {
        match self.files.get(name)? {
            Entry::Path(path) => Some(path),
            Entry::Memory(_) => None,
        }
    }

    /// The content of a file, or `None` when the model has no such file. Large files are memory-mapped: they
    /// must not be cut short by anybody while the bytes are in use.
    ///
    /// # Errors
    /// [`Error::Io`] when the file is there and cannot be read.
    pub fn get(&self, name: &str) -> Result<Option<Bytes>> {
        match self.files.get(name) {
            None => Ok(None),
            #[cfg(not(target_arch = "wasm32"))]
            Some(Entry::Path(path)) => read(path).map(Some).map_err(Error::io(path)),
            Some(Entry::Memory(bytes)) => Ok(Some(bytes.clone())),
        }
    }

    /// A JSON file, or `None` when the model has no such file.
    ///
    /// # Errors
    /// [`Error::Json`] when it does not parse as a `T`; as [`ModelFiles::get`] else.
    pub fn json<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>> {
        let Some(bytes) = self.get(name)? else {
            return Ok(None);
        };
        let value = serde_json::from_slice(&bytes).map_err(|source| Error::Json {
            file: self.describe(name),
            source,
        })?;
        Ok(Some(value))
    }

    /// A text file, or `None` when the model has no such file.
    ///
    /// # Errors
    /// [`Error::Format`] when it is not UTF-8; as [`ModelFiles::get`] else.
    pub fn text(&self, name: &str) -> Result<Option<String>> {
        let Some(bytes) = self.get(name)? else {
            return Ok(None);
        };
        match std::str::from_utf8(&bytes) {
            Ok(text) => Ok(Some(text.to_owned())),
            Err(error) => Err(Error::format(
                self.describe(name),
                format!("is not UTF-8 text: {error}"),
            )),
        }
    }

    /// The name of the GGUF file, if that is what the model is: there is one, and there are no weights in
    /// another container. Of a split file it is the first part; of several files, the first by name that is
    /// not a projector (`mmproj`).
    pub fn gguf(&self) -> Option<&str> {
        let other = |name: &str| {
            name.ends_with(".safetensors")
                || name.ends_with(".safetensors.index.json")
                || is_torch_weights(name)
        };
        if self.names().any(other) {
            return None;
        }
        let mut first = None;
        for name in self
            .names()
            .filter(|name| name.to_ascii_lowercase().ends_with(".gguf"))
        {
            if !name.contains("mmproj") {
                return Some(name);
            }
            first = first.or(Some(name));
        }
        first
    }

    /// The metadata of the GGUF file, if that is what the model is. It is read once.
    ///
    /// # Errors
    /// [`Error::Format`] when its header breaks the rules of the format; as [`ModelFiles::get`] else.
    pub fn gguf_metadata(&self) -> Result<Option<&Metadata>> {
        Ok(self.gguf_file()?.map(|file| &*file.metadata))
    }

    /// The first or only part of a GGUF.
    pub(crate) fn gguf_file(&self) -> Result<Option<&GgufFile>> {
        if let Some(file) = self.gguf.get() {
            return Ok(Some(file));
        }
        let Some(name) = self.gguf() else {
            return Ok(None);
        };
        let Some(bytes) = self.get(name)? else {
            return Ok(None);
        };
        let file = GgufFile::parse(&bytes, &self.describe(name))?;
        Ok(Some(self.gguf.get_or_init(|| file)))
    }

    /// `name` with the model it belongs to, for messages.
    pub fn describe(&self, name: &str) -> String {
        if self.name.ends_with(name) {
            self.name.to_string()
        } else {
            format!("{}/{name}", self.name)
        }
    }
}

/// True for the weight files of `torch.save` that Transformers writes.
fn is_torch_weights(name: &str) -> bool {
    let file = name.rsplit('/').next().unwrap_or(name);
    file.starts_with("pytorch_model") && (file.ends_with(".bin") || file.ends_with(".bin.index.json"))
}

#[cfg(not(target_arch = "wasm32"))]
fn walk(folder: &Path, prefix: &str, depth: usize, files: &mut BTreeMap<String, Entry>) -> Result<()> {
    for entry in std::fs::read_dir(folder).map_err(Error::io(folder))? {
        let entry = entry.map_err(Error::io(folder))?;
        let path = entry.path();
        // A name that is not UTF-8 cannot be asked for, and hidden files are never part of a model.
        let Some(name) = entry
            .file_name()
            .to_str()
            .map(str::to_owned)
            .filter(|name| !name.starts_with('.'))
        else {
            continue;
        };
        let kind = entry.file_type().map_err(Error::io(&path))?;
        if kind.is_dir() {
            if depth > 0 {
                walk(&path, &format!("{prefix}{name}/"), depth - 1, files)?;
            }
        } else if kind.is_file() || path.is_file() {
            // The second case is a link to a file, as in the snapshots of the Hub's cache.
            if files.len() >= MAX_FILES {
                let what = format!("holds more than {MAX_FILES} files: name the folder of one model");
                return Err(Error::format(folder.display().to_string(), what));
            }
            files.insert(format!("{prefix}{name}"), Entry::Path(path));
        }
    }
    Ok(())
}

#[cfg(not(target_arch = "wasm32"))]
fn read(path: &Path) -> std::io::Result<Bytes> {
    let file = std::fs::File::open(path)?;
    if file.metadata()?.len() < MAP_FROM {
        return std::fs::read(path).map(Bytes::from);
    }
    // SAFETY: the mapping is private and read-only. Files of the cache are never changed in place (they are
    // written beside and renamed), and the documentation of `ModelFiles::get` asks the same of other files.
    let map = unsafe { memmap2::MmapOptions::new().map(&file)? };
    Ok(mapped::bytes(map))
}

/// Says that `bytes` will hardly be read again: where they are mapped from a file, the memory that holds them goes
/// back to the system. They stay readable.
pub fn release(bytes: &[u8]) {
    #[cfg(unix)]
    mapped::release(bytes);
    #[cfg(not(unix))]
    let _ = bytes;
}

#[cfg(not(target_arch = "wasm32"))]
mod mapped {
    use std::sync::{Arc, Mutex, Weak};

    use bytes::Bytes;
    use memmap2::Mmap;

    /// The mappings that are alive, and some that were.
    static ALL: Mutex<Vec<Weak<Mmap>>> = Mutex::new(Vec::new());

    struct Owner(Arc<Mmap>);

    impl AsRef<[u8]> for Owner {
        fn as_ref(&self) -> &[u8] {
            &self.0
        }
    }

    pub(super) fn bytes(map: Mmap) -> Bytes {
        let map = Arc::new(map);
        if let Ok(mut all) = ALL.lock() {
            all.retain(|map| map.strong_count() > 0);
            all.push(Arc::downgrade(&map));
        }
        Bytes::from_owner(Owner(map))
    }

    #[cfg(unix)]
    pub(super) fn release(bytes: &[u8]) {
        let Ok(all) = ALL.lock() else { return };
        let range = bytes.as_ptr_range();
        for map in all.iter().filter_map(Weak::upgrade) {
            let whole = map.as_ptr_range();
            if whole.start <= range.start && range.end <= whole.end {
                let offset = range.start.addr() - whole.start.addr();
                // SAFETY: the mapping is private, read-only and of a file: what is dropped is read from the
                // file again when it is asked for. Where it fails, memory stays in use.
                let _ = unsafe {
                    map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, offset, bytes.len())
                };
            }
        }
    }
}

#[cfg(all(test, not(target_arch = "wasm32")))]
mod tests {
    use super::*;

    #[test]
    fn a_folder_with_its_folders() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(folder.path().join("1_Pooling")).unwrap();
        std::fs::create_dir_all(folder.path().join(".git")).unwrap();
        std::fs::write(folder.path().join("config.json"), r#"{"hidden_size": 64}"#).unwrap();
        std::fs::write(folder.path().join("1_Pooling/config.json"), "{").unwrap();
        std::fs::write(folder.path().join(".git/config"), "").unwrap();
        std::fs::write(folder.path().join("big.bin"), vec![7; 100_000]).unwrap();
        let files = ModelFiles::from_dir(folder.path()).unwrap();
        assert_eq!(
            files.names().collect::<Vec<_>>(),
            ["1_Pooling/config.json", "big.bin", "config.json"]
        );
        let big = files.get("big.bin").unwrap().unwrap();
        release(&big[5000..90_000]);
        release(&[0; 10]);
        assert_eq!(big, vec![7; 100_000]);
        assert!(files.get("../config.json").unwrap().is_none());
        let config: serde_json::Value = files.json("config.json").unwrap().unwrap();
        assert_eq!(config["hidden_size"], 64);
        let error = files
            .json::<serde_json::Value>("1_Pooling/config.json")
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("1_Pooling/config.json") && error.contains("line 1"),
            "{error}"
        );
    }

    #[test]
    fn what_counts_as_gguf() {
        let files = |names: &[&str]| {
            ModelFiles::from_memory("m", names.iter().map(|name| (name.to_string(), Bytes::new())))
        };
        assert_eq!(files(&["mmproj-a.gguf", "model.gguf"]).gguf(), Some("model.gguf"));
        assert_eq!(
            files(&["m-00002-of-00002.gguf", "m-00001-of-00002.gguf"]).gguf(),
            Some("m-00001-of-00002.gguf")
        );
        assert_eq!(files(&["a.gguf", "model.safetensors"]).gguf(), None);
        assert_eq!(files(&["config.json"]).gguf(), None);
    }

    #[test]
    fn missing_and_broken_files() {
        let folder = tempfile::tempdir().unwrap();
        let missing = folder.path().join("none.gguf");
        assert!(
            ModelFiles::from_file(&missing)
                .unwrap_err()
                .to_string()
                .contains("none.gguf")
        );
        assert!(
            ModelFiles::from_file(folder.path())
                .unwrap_err()
                .to_string()
                .contains("is not a file")
        );
        let files = ModelFiles::from_memory("m", [("a.txt".to_owned(), Bytes::from_static(&[0xff]))]);
        assert!(files.text("a.txt").unwrap_err().to_string().contains("m/a.txt"));
    }
}
