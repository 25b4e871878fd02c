//! Unpacks wheels and source distributions: data files only, inside the folder only, within limits.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read, Write};
use std::path::Path;

use flate2::read::GzDecoder;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::download::{create_parent, hex};
use super::names::safe;
use crate::{Error, Result};

/// What an archive may at most become.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// Bytes of all files together.
    pub bytes: u64,
    /// Number of files.
    pub files: usize,
}

impl Limits {
    /// For an archive of so many bytes: weights do not shrink to a hundredth, bombs do.
    pub(crate) fn of(archive: u64) -> Self {
        Self {
            bytes: archive.saturating_mul(100).saturating_add(64 << 20),
            files: 100_000,
        }
    }
}

/// A file as it was unpacked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Unpacked {
    pub size: u64,
    pub sha256: String,
}

/// Unpacks the archive at `path` (a zip file or, with `.tar.gz`, a compressed tape archive) into `folder`.
/// Programs are left out: nothing of a package is ever executed, so nothing of it needs to be there.
pub(crate) fn unpack(
    path: &Path,
    name: &str,
    folder: &Path,
    limits: Limits,
) -> Result<BTreeMap<String, Unpacked>> {
    let file = BufReader::new(File::open(path).map_err(Error::io(path))?);
    let mut sink = Sink {
        name,
        folder,
        limits,
        files: BTreeMap::new(),
        bytes: 0,
    };
    if name.ends_with(".whl") || name.ends_with(".zip") {
        let mut archive = zip::ZipArchive::new(file).map_err(|error| broken(name, &error))?;
        for index in 0..archive.len() {
            let mut entry = archive.by_index(index).map_err(|error| broken(name, &error))?;
            let member = entry.name().map_err(|error| broken(name, &error))?.into_owned();
            if entry.is_dir() {
                continue;
            }
            if !entry.is_file() {
                return Err(Error::unsupported(
                    name,
                    format!("the link {member:?} in an archive"),
                    "",
                ));
            }
            let size = entry.size();
            // A source distribution as zip has its files in one folder, as the tape archive has.
            let member = if name.ends_with(".zip") {
                inside(&member)
            } else {
                &member
            };
            sink.take(member, size, &mut entry)?;
        }
    } else {
        let mut archive = tar::Archive::new(GzDecoder::new(file));
        // The name that the entry before gave to the next one. Read here, because the library would read a
        // name of any length into memory.
        let mut given = None;
        for entry in archive.entries().map_err(|error| broken(name, &error))?.raw(true) {
            let mut entry = entry.map_err(|error| broken(name, &error))?;
            let (kind, size) = (entry.header().entry_type(), entry.size());
            if kind.is_gnu_longname() || kind.is_pax_local_extensions() {
                given = long_name(name, &mut entry, kind.is_pax_local_extensions())?.or(given);
                continue;
            }
            let member = given.take().unwrap_or_else(|| entry.path_bytes().into_owned());
            if !kind.is_file() {
                continue;
            }
            let member = String::from_utf8(member)
                .map_err(|error| broken(name, &format!("a name is not UTF-8: {error}")))?;
            safe(&member, name)?;
            sink.take(inside(&member), size, &mut entry)?;
        }
    }
    Ok(sink.files)
}

/// The name that an extension entry of a tape archive gives to the next entry.
fn long_name(archive: &str, entry: &mut impl Read, pax: bool) -> Result<Option<Vec<u8>>> {
    const LONGEST: u64 = 64 << 10;
    let mut bytes = Vec::new();
    entry
        .take(LONGEST + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| broken(archive, &error))?;
    if bytes.len() as u64 > LONGEST {
        return Err(broken(
            archive,
            &format!("an extension is longer than {LONGEST} bytes"),
        ));
    }
    if !pax {
        bytes.truncate(bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len()));
        return Ok(Some(bytes));
    }
    let mut path = None;
    for extension in tar::PaxExtensions::new(&bytes) {
        let extension = extension.map_err(|error| broken(archive, &error))?;
        match extension.key_bytes() {
            b"path" => path = Some(extension.value_bytes().to_vec()),
            b"size" => {
                return Err(Error::unsupported(
                    archive,
                    "a file of more than 8 GiB in a tape archive",
                    "",
                ));
            }
            _ => {}
        }
    }
    Ok(path)
}

/// The name without the folder `NAME-VERSION` that everything in a source distribution lies in.
fn inside(member: &str) -> &str {
    member.split_once('/').map_or(member, |(_, rest)| rest)
}

fn broken(name: &str, error: &dyn std::fmt::Display) -> Error {
    Error::format(name, format!("the archive is broken: {error}"))
}

fn is_program(member: &str) -> bool {
    const ENDS: [&str; 9] = [
        ".py", ".pyc", ".pyi", ".pyd", ".so", ".dll", ".dylib", ".exe", ".pth",
    ];
    let member = member.to_ascii_lowercase();
    ENDS.iter().any(|end| member.ends_with(end)) || member.contains(".so.")
}

struct Sink<'a> {
    name: &'a str,
    folder: &'a Path,
    limits: Limits,
    files: BTreeMap<String, Unpacked>,
    bytes: u64,
}

impl Sink<'_> {
    /// Writes one member, which must be exactly as long as declared.
    fn take(&mut self, member: &str, size: u64, content: &mut dyn Read) -> Result<()> {
        safe(member, self.name)?;
        self.bytes = self.bytes.saturating_add(size);
        if self.bytes > self.limits.bytes || self.files.len() >= self.limits.files {
            let Limits { bytes, files } = self.limits;
            return Err(broken(
                self.name,
                &format!("it unpacks to more than {bytes} bytes or {files} files"),
            ));
        }
        if is_program(member) {
            return Ok(());
        }
        let path = self.folder.join(member);
        create_parent(&path)?;
        let mut file = File::create_new(&path).map_err(|error| match error.kind() {
            std::io::ErrorKind::AlreadyExists => broken(self.name, &format!("{member:?} is there twice")),
            _ => Error::io(&path)(error),
        })?;
        let mut hasher = Sha256::new();
        let mut buffer = vec![0; 256 << 10];
        let mut written = 0;
        loop {
            let count = content
                .read(&mut buffer)
                .map_err(|error| broken(self.name, &format!("{member:?}: {error}")))?;
            if count == 0 {
                break;
            }
            written += count as u64;
            if written > size {
                return Err(broken(
                    self.name,
                    &format!("{member:?} is longer than the {size} bytes declared"),
                ));
            }
            hasher.update(&buffer[..count]);
            file.write_all(&buffer[..count]).map_err(Error::io(&path))?;
        }
        if written < size {
            return Err(broken(
                self.name,
                &format!("{member:?} ends after {written} of {size} bytes"),
            ));
        }
        file.sync_all().map_err(Error::io(&path))?;
        self.files.insert(
            member.to_owned(),
            Unpacked {
                size,
                sha256: hex(&hasher.finalize()),
            },
        );
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Cursor;
    use zip::write::SimpleFileOptions;

    pub(crate) fn wheel(files: &[(&str, &[u8])]) -> Vec<u8> {
        let mut writer = zip::ZipWriter::new(Cursor::new(Vec::new()));
        for (name, content) in files {
            writer.start_file(*name, SimpleFileOptions::default()).unwrap();
            writer.write_all(content).unwrap();
        }
        writer.finish().unwrap().into_inner()
    }

    /// A tape archive whose names are written as they are, `..` included.
    fn sdist(files: &[(&str, &[u8], tar::EntryType)]) -> Vec<u8> {
        let gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        let mut builder = tar::Builder::new(gz);
        for (name, content, kind) in files {
            let mut header = tar::Header::new_gnu();
            header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
            header.set_size(content.len() as u64);
            header.set_entry_type(*kind);
            header.set_mode(0o644);
            header.set_cksum();
            builder.append(&header, *content).unwrap();
        }
        builder.into_inner().unwrap().finish().unwrap()
    }

    fn try_unpack(
        name: &str,
        bytes: &[u8],
        limits: Limits,
    ) -> (tempfile::TempDir, Result<BTreeMap<String, Unpacked>>) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("archive");
        std::fs::write(&path, bytes).unwrap();
        let into = folder.path().join("in");
        std::fs::create_dir(&into).unwrap();
        let result = unpack(&path, name, &into, limits);
        (folder, result)
    }

    #[test]
    fn a_wheel_and_a_source_distribution() {
        let bytes = wheel(&[
            ("m/model.gguf", b"GGUF"),
            ("m/__init__.py", b"boom()"),
            ("m-1.dist-info/METADATA", b"x"),
        ]);
        let (folder, files) = try_unpack("m-1-py3-none-any.whl", &bytes, Limits::of(1000));
        assert_eq!(
            files.unwrap().keys().collect::<Vec<_>>(),
            ["m-1.dist-info/METADATA", "m/model.gguf"]
        );
        assert_eq!(
            std::fs::read(folder.path().join("in/m/model.gguf")).unwrap(),
            b"GGUF"
        );
        let file = tar::EntryType::Regular;
        let bytes = sdist(&[
            ("m-1/m/model.gguf", b"GGUF", file),
            ("m-1/setup.py", b"boom()", file),
            ("m-1/l", b"", tar::EntryType::Symlink),
        ]);
        let (_folder, files) = try_unpack("m-1.tar.gz", &bytes, Limits::of(1000));
        let files = files.unwrap();
        assert_eq!(files.keys().collect::<Vec<_>>(), ["m/model.gguf"]);
        assert_eq!(files["m/model.gguf"].size, 4);
    }

    #[test]
    fn names_that_lead_outside() {
        for name in ["../evil", "m/../../evil", "/evil", "..\\evil", "C:/evil"] {
            let (folder, result) = try_unpack("m.whl", &wheel(&[(name, b"x")]), Limits::of(1000));
            assert!(
                matches!(result, Err(Error::UnsafePath { .. })),
                "{name}: {result:?}"
            );
            assert!(!folder.path().join("evil").exists());
            let bytes = sdist(&[(name, b"x", tar::EntryType::Regular)]);
            let (folder, result) = try_unpack("m.tar.gz", &bytes, Limits::of(1000));
            assert!(
                matches!(result, Err(Error::UnsafePath { .. })),
                "{name}: {result:?}"
            );
            assert!(!folder.path().join("evil").exists());
        }
    }

    #[test]
    fn limits_and_lies() {
        let bytes = wheel(&[("a", &[0; 1000]), ("b", &[0; 1000])]);
        let limit = |bytes, files| Limits { bytes, files };
        assert!(
            try_unpack("m.whl", &bytes, limit(1999, 9))
                .1
                .unwrap_err()
                .to_string()
                .contains("more than 1999")
        );
        assert!(try_unpack("m.whl", &bytes, limit(9999, 1)).1.is_err());
        assert!(try_unpack("m.whl", &bytes, limit(2000, 2)).1.is_ok());
        // The length that the central directory declares, made smaller and larger than the truth.
        for declared in [10u32, 5000, u32::MAX] {
            let mut bytes = wheel(&[("a", &[7; 1000])]);
            let at = bytes.windows(4).rposition(|four| four == b"PK\x01\x02").unwrap() + 24;
            bytes[at..at + 4].copy_from_slice(&declared.to_le_bytes());
            assert!(
                try_unpack("m.whl", &bytes, Limits::of(1000)).1.is_err(),
                "{declared}"
            );
        }
        let whole = wheel(&[("a", &[7; 1000])]);
        for length in 0..whole.len() {
            assert!(try_unpack("m.whl", &whole[..length], Limits::of(1000)).1.is_err());
        }
        let whole = sdist(&[("m/a", &[7; 1000], tar::EntryType::Regular)]);
        for length in 0..whole.len() / 2 {
            let (_folder, result) = try_unpack("m.tar.gz", &whole[..length], Limits::of(1000));
            assert!(result.is_err() || result.unwrap().is_empty());
        }
    }

    #[test]
    fn long_names() {
        let long = format!("m-1/{}/model.gguf", "folder/".repeat(30));
        let gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        let mut builder = tar::Builder::new(gz);
        let mut header = tar::Header::new_gnu();
        header.set_size(4);
        header.set_mode(0o644);
        builder
            .append_data(&mut header, long.replace("//", "/"), b"GGUF".as_slice())
            .unwrap();
        builder
            .append_pax_extensions([("path", b"m-1/other.gguf".as_slice()), ("mtime", b"1.5")])
            .unwrap();
        let mut header = tar::Header::new_gnu();
        header.set_size(5);
        header.set_path("m-1/short").unwrap();
        header.set_cksum();
        builder.append(&header, b"GGUF2".as_slice()).unwrap();
        let bytes = builder.into_inner().unwrap().finish().unwrap();
        let files = try_unpack("m.tar.gz", &bytes, Limits::of(1000)).1.unwrap();
        assert_eq!(files.len(), 2);
        assert_eq!(files["other.gguf"].size, 5);
        // A name without an end.
        let bytes = sdist(&[("m-1/name", &[b'a'; 100_000], tar::EntryType::GNULongName)]);
        assert!(
            try_unpack("m.tar.gz", &bytes, Limits::of(1000))
                .1
                .unwrap_err()
                .to_string()
                .contains("longer than")
        );
    }

    proptest::proptest! {
        #[test]
        fn damaged_archives(tape: bool, changes in proptest::collection::vec((0usize..2000, 0u8..), 1..8)) {
            let file = tar::EntryType::Regular;
            let (name, mut bytes) = match tape {
                true => ("m.tar.gz", sdist(&[("m/a", &[7; 900], file), ("m/b/c", b"text", file)])),
                false => ("m.whl", wheel(&[("a", &[7; 900]), ("b/c", b"text")])),
            };
            let length = bytes.len();
            for (at, value) in changes {
                bytes[at % length] = value;
            }
            // Whatever comes of it stays inside and within the limits.
            let (folder, result) = try_unpack(name, &bytes, Limits { bytes: 2000, files: 4 });
            if let Ok(files) = result {
                for (name, file) in files {
                    proptest::prop_assert!(folder.path().join("in").join(&name).metadata().unwrap().len() == file.size);
                }
            }
        }
    }
}
