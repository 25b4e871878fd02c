//! Files that come into being whole or not at all.

use std::fs::File;
use std::io::{self, BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use crate::{Error, Result};

/// A file that is written beside its place, and takes it when it is whole; dropped before, nothing is left of it.
#[derive(Debug)]
pub struct OutputFile {
    /// `None` once it has taken its place.
    file: Option<BufWriter<File>>,
    part: PathBuf,
    path: PathBuf,
}

impl OutputFile {
    /// Begins a file. What is at `path` stays as it is until [`finish`](Self::finish).
    ///
    /// # Errors
    /// [`Error::Io`] where the folder cannot be written to, [`Error::Format`] where `path` is a folder or names no file.
    pub fn create(path: &Path) -> Result<Self> {
        let name = path.file_name().filter(|_| !path.is_dir()).ok_or_else(|| {
            Error::format(
                path.display().to_string(),
                "is no name that a file can be written to",
            )
        })?;
        let mut part = std::ffi::OsString::from(".");
        part.push(name);
        part.push(format!(".{}.part", std::process::id()));
        let part = path.with_file_name(part);
        let file = File::create(&part).map_err(Error::io(&part))?;
        Ok(Self {
            file: Some(BufWriter::with_capacity(1 << 20, file)),
            part,
            path: path.to_path_buf(),
        })
    }

    /// Writes everything to the disk and puts the file into its place.
    ///
    /// # Errors
    /// [`Error::Io`], for example where the disk is full; nothing is left then.
    pub fn finish(mut self) -> Result<()> {
        let Some(file) = self.file.take() else {
            return Ok(());
        };
        let done = file
            .into_inner()
            .map_err(io::IntoInnerError::into_error)
            .and_then(|file| file.sync_all())
            .and_then(|()| std::fs::rename(&self.part, &self.path));
        if done.is_err() {
            let _ = std::fs::remove_file(&self.part);
        }
        done.map_err(Error::io(&self.path))
    }
}

impl Write for OutputFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match &mut self.file {
            Some(file) => file.write(bytes),
            None => Ok(0),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.as_mut().map_or(Ok(()), Write::flush)
    }
}

impl Seek for OutputFile {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.file.as_mut().map_or(Ok(0), |file| file.seek(to))
    }
}

impl Drop for OutputFile {
    fn drop(&mut self) {
        if self.file.take().is_some() {
            // There is nobody to tell.
            let _ = std::fs::remove_file(&self.part);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_or_not_at_all() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.gguf");
        std::fs::write(&path, "old").unwrap();
        let mut file = OutputFile::create(&path).unwrap();
        file.write_all(b"half of").unwrap();
        drop(file);
        assert_eq!(std::fs::read(&path).unwrap(), b"old");
        let mut file = OutputFile::create(&path).unwrap();
        file.write_all(b"new").unwrap();
        file.finish().unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"new");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
        assert!(OutputFile::create(folder.path()).is_err());
    }
}
