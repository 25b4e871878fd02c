//! What is kept: models of the Hub and unpacked packages, with their sizes; verifying and removing them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::download::{Checksum, Lock, with_suffix};
use super::progress::Event;
use super::pypi::{FILES, MANIFEST};
use super::{names, pypi};
use crate::{Error, FetchOptions, Result};

/// Where a model in the cache came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// A repository of the Hub.
    Hub,
    /// A Python package.
    Package,
}

/// A model in the cache.
#[derive(Debug, Clone)]
pub struct CachedModel {
    /// Where it came from.
    pub kind: Kind,
    /// As it is named on the command line: `org/name` or `pypi:NAME==VERSION`.
    pub name: String,
    /// Its folder.
    pub path: PathBuf,
    /// Bytes on the disk; contents that revisions share count once.
    pub size: u64,
    /// When anything of it last changed.
    pub modified: Option<SystemTime>,
    /// The revisions that are there; of a package, the one version.
    pub revisions: Vec<Revision>,
    /// Bytes of transfers that were interrupted; they go on when the model is fetched again.
    pub incomplete: u64,
}

/// A revision of a model in the cache.
#[derive(Debug, Clone)]
pub struct Revision {
    /// The commit, or the version of a package.
    pub id: String,
    /// The branches and tags that stand for it.
    pub refs: Vec<String>,
    /// The names of its files.
    pub files: Vec<String>,
}

/// What verifying a file found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// The content is what was published.
    Good,
    /// The content has another checksum.
    Corrupt {
        /// The published digest.
        expected: String,
        /// The digest of what is there.
        actual: String,
    },
    /// The file is gone, or a link leads nowhere.
    Missing,
    /// Nothing says what the content should be.
    Unknown,
}

/// A file that was verified.
#[derive(Debug, Clone)]
pub struct Verified {
    /// The model, as [`CachedModel::name`].
    pub model: String,
    /// The file, relative to the model's folder.
    pub file: String,
    /// What was found.
    pub verdict: Verdict,
}

/// All models in the cache, by name.
///
/// # Errors
/// [`Error::Io`] when a folder of the cache cannot be read.
pub fn list(options: &FetchOptions) -> Result<Vec<CachedModel>> {
    let mut models = Vec::new();
    for path in entries(&options.hub_cache)? {
        if let Some(id) = file_name(&path)
            .strip_prefix("models--")
            .filter(|_| path.is_dir())
        {
            models.push(list_repo(&path, id.replacen("--", "/", 1))?);
        }
    }
    for package in entries(&options.packages())? {
        for path in entries(&package)? {
            if let Some(manifest) = pypi::read_manifest(&path)? {
                let revision = Revision {
                    id: manifest.version.clone(),
                    refs: Vec::new(),
                    files: manifest.files.keys().cloned().collect(),
                };
                models.push(CachedModel {
                    kind: Kind::Package,
                    name: format!("pypi:{}=={}", manifest.name, manifest.version),
                    size: manifest.files.values().map(|file| file.size).sum(),
                    modified: modified(&path.join(MANIFEST)),
                    revisions: vec![revision],
                    incomplete: 0,
                    path,
                });
            }
        }
    }
    models.sort_by(|a, b| (a.kind, &a.name).cmp(&(b.kind, &b.name)));
    Ok(models)
}

fn list_repo(path: &Path, name: String) -> Result<CachedModel> {
    let (mut size, mut incomplete, mut newest) = (0, 0, None);
    for blob in entries(&path.join("blobs"))? {
        let length = blob.metadata().map_or(0, |meta| meta.len());
        newest = newest.max(modified(&blob));
        match file_name(&blob).ends_with(".incomplete") {
            true => incomplete += length,
            false => size += length,
        }
    }
    let mut refs: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let folder = path.join("refs");
    for file in below(&folder)? {
        let commit = std::fs::read_to_string(&file).map_err(Error::io(&file))?;
        refs.entry(commit.trim().to_owned())
            .or_default()
            .push(relative(&file, &folder));
    }
    let mut revisions = Vec::new();
    for snapshot in entries(&path.join("snapshots"))? {
        let id = file_name(&snapshot).to_owned();
        let files = below(&snapshot)?
            .iter()
            .map(|file| relative(file, &snapshot))
            .collect();
        revisions.push(Revision {
            refs: refs.remove(&id).unwrap_or_default(),
            id,
            files,
        });
    }
    Ok(CachedModel {
        kind: Kind::Hub,
        name,
        path: path.to_path_buf(),
        size,
        modified: newest,
        revisions,
        incomplete,
    })
}

/// Computes the checksums of a model's files, or of all models' with `None`, and compares them with the
/// published ones.
///
/// # Errors
/// [`Error::NotFound`] when the cache has no model of this name.
pub fn verify(name: Option<&str>, options: &FetchOptions) -> Result<Vec<Verified>> {
    let mut found = Vec::new();
    for model in chosen(name, options)? {
        let mut add = |file: String, verdict| {
            options.progress.event(Event::Done { file: &file });
            found.push(Verified {
                model: model.name.clone(),
                file,
                verdict,
            });
        };
        match model.kind {
            Kind::Hub => {
                for blob in entries(&model.path.join("blobs"))? {
                    let name = file_name(&blob);
                    if name.ends_with(".incomplete") {
                        continue;
                    }
                    options.progress.event(Event::Start {
                        file: name,
                        at: 0,
                        total: None,
                    });
                    let length = blob.metadata().map_err(Error::io(&blob))?.len();
                    add(
                        format!("blobs/{name}"),
                        judge(Checksum::of_name(name, length), &blob)?,
                    );
                }
                for snapshot in below(&model.path.join("snapshots"))? {
                    if !snapshot.exists() {
                        add(relative(&snapshot, &model.path), Verdict::Missing);
                    }
                }
            }
            Kind::Package => {
                for (file, known) in pypi::read_manifest(&model.path)?
                    .map(|manifest| manifest.files)
                    .unwrap_or_default()
                {
                    options.progress.event(Event::Start {
                        file: &file,
                        at: 0,
                        total: Some(known.size),
                    });
                    let verdict = judge(
                        Some(Checksum::Sha256(known.sha256)),
                        &model.path.join(FILES).join(&file),
                    )?;
                    add(file, verdict);
                }
            }
        }
    }
    Ok(found)
}

fn judge(checksum: Option<Checksum>, path: &Path) -> Result<Verdict> {
    let Some(checksum) = checksum else {
        return Ok(Verdict::Unknown);
    };
    match checksum.check_file(path) {
        Ok(()) => Ok(Verdict::Good),
        Err(Error::Checksum { expected, actual, .. }) => Ok(Verdict::Corrupt { expected, actual }),
        Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
            Ok(Verdict::Missing)
        }
        Err(other) => Err(other),
    }
}

/// Removes a model from the cache: `org/name`, or `pypi:NAME==VERSION`. The bytes that became free.
///
/// # Errors
/// [`Error::NotFound`] when the cache has no model of this name.
pub fn remove(name: &str, options: &FetchOptions) -> Result<u64> {
    let mut freed = 0;
    for model in chosen(Some(name), options)? {
        let lock = options.home.join("oxiformers").join("remove.lock");
        let _lock = Lock::acquire(&lock, name, options)?;
        // Renamed first: nobody finds a model of which half is gone.
        let doomed = with_suffix(&model.path, &format!(".{}.removed", std::process::id()));
        std::fs::rename(&model.path, &doomed).map_err(Error::io(&model.path))?;
        std::fs::remove_dir_all(&doomed).map_err(Error::io(&doomed))?;
        if let (Kind::Package, Some(parent)) = (model.kind, model.path.parent()) {
            // Succeeds with the last version only.
            let _ = std::fs::remove_dir(parent);
        }
        freed += model.size + model.incomplete;
    }
    Ok(freed)
}

fn chosen(name: Option<&str>, options: &FetchOptions) -> Result<Vec<CachedModel>> {
    let mut models = list(options)?;
    let Some(name) = name else { return Ok(models) };
    let wanted = match name.strip_prefix("pypi:").and_then(|rest| rest.split_once("==")) {
        Some((package, version)) => format!("pypi:{}=={version}", pypi::normal(package)),
        None => name.to_owned(),
    };
    let known: BTreeSet<String> = models.iter().map(|model| model.name.clone()).collect();
    models.retain(|model| model.name == wanted);
    if models.is_empty() {
        let known: Vec<String> = known.into_iter().collect();
        return Err(Error::not_found(
            name,
            "the cache",
            format!("it holds {}", names::listed(&known)),
        ));
    }
    Ok(models)
}

/// The entries of a folder in order; none when there is no such folder.
fn entries(folder: &Path) -> Result<Vec<PathBuf>> {
    let listed = match std::fs::read_dir(folder) {
        Ok(listed) => listed,
        Err(error)
            if matches!(
                error.kind(),
                std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory
            ) =>
        {
            return Ok(Vec::new());
        }
        Err(error) => return Err(Error::io(folder)(error)),
    };
    let paths: std::io::Result<Vec<PathBuf>> = listed.map(|entry| Ok(entry?.path())).collect();
    let mut paths = paths.map_err(Error::io(folder))?;
    paths.retain(|path| !file_name(path).starts_with('.'));
    paths.sort();
    Ok(paths)
}

/// All files (and links that lead nowhere) in a folder and the folders in it.
fn below(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for path in entries(folder)? {
        // Not through links: a snapshot links to files only.
        if path.symlink_metadata().map_err(Error::io(&path))?.is_dir() {
            files.append(&mut below(&path)?);
        } else {
            files.push(path);
        }
    }
    Ok(files)
}

fn file_name(path: &Path) -> &str {
    path.file_name().and_then(|name| name.to_str()).unwrap_or("")
}

fn relative(path: &Path, folder: &Path) -> String {
    let inside = path.strip_prefix(folder).unwrap_or(path);
    inside
        .iter()
        .map(|part| part.to_string_lossy())
        .collect::<Vec<_>>()
        .join("/")
}

fn modified(path: &Path) -> Option<SystemTime> {
    path.metadata().and_then(|meta| meta.modified()).ok()
}
