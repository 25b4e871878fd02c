//! The Hugging Face Hub and its cache: `models--ORG--NAME/{blobs,snapshots,refs}` (`datasets--…` for data
//! sets), shared with Python.

use std::path::{Path, PathBuf};

use futures::{FutureExt, StreamExt, TryStreamExt};
use hf_hub::repository::RepoTreeEntry;
use hf_hub::{HFClient, HFError, RepoType, RepoTypeAny, split_id};
use reqwest::header::ETAG;
use url::Url;

use super::download::{self, Checksum, Download, Lock};
use super::http::{self, Body};
use super::names::{self, Selection, Weights};
use super::progress::Event;
use crate::{Error, FetchOptions, ModelFiles, Result};

/// More entries than this are not the listing of one model.
const MAX_ENTRIES: usize = 100_000;

/// A repository at a revision, and perhaps one file of it.
pub(crate) struct Repo<'a> {
    pub id: &'a str,
    pub kind: RepoKind,
    pub revision: &'a str,
    pub file: Option<&'a str>,
    pub options: &'a FetchOptions,
}

/// What a repository holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RepoKind {
    Model,
    Dataset,
}

impl RepoKind {
    fn any(self) -> RepoTypeAny {
        match self {
            Self::Model => RepoTypeAny::Model,
            Self::Dataset => RepoTypeAny::Dataset,
        }
    }
}

/// A file of the repository, as the Hub lists it.
struct Listed {
    name: String,
    size: u64,
    /// Git's name of the content: of the file itself, or of the pointer to a large one.
    oid: String,
    large: bool,
}

impl Repo<'_> {
    /// The files of the model: the newest of the revision where the Hub can be reached, else those in the
    /// cache if they are complete.
    pub(crate) fn resolve(&self) -> Result<ModelFiles> {
        if self.options.offline {
            return self.cached()?.ok_or_else(|| Error::Offline {
                what: self.to_string(),
                hint: String::new(),
            });
        }
        match self.fetch() {
            Err(error) if is_outage(&error) => match self.cached()? {
                Some(files) => {
                    let notice = format!("{error}: taking {self} from the cache");
                    self.options.progress.event(Event::Notice(&notice));
                    Ok(files)
                }
                None => Err(error),
            },
            other => other,
        }
    }

    /// What the cache has, if it is a whole model. Asks nobody.
    pub(crate) fn cached(&self) -> Result<Option<ModelFiles>> {
        let commit = if is_commit(self.revision) {
            self.revision.to_owned()
        } else {
            match std::fs::read_to_string(self.folder().join("refs").join(self.revision)) {
                Ok(commit) if is_commit(commit.trim()) => commit.trim().to_owned(),
                _ => return Ok(None),
            }
        };
        let snapshot = self.snapshot(&commit);
        if !snapshot.is_dir() {
            return Ok(None);
        }
        let all = ModelFiles::from_dir(&snapshot)?;
        let names: Vec<String> = all.names().map(str::to_owned).collect();
        // Nothing of a model in the snapshot, or not all of its shards: the cache does not have it.
        let Ok(selection) = names::select(&names, self.file, self.id) else {
            return Ok(None);
        };
        let Ok(weights) = self.weights(&selection, &snapshot, &names) else {
            return Ok(None);
        };
        let whole_gguf = weights.first().is_some_and(|first| names::is_gguf(first));
        if !whole_gguf && !names.iter().any(|name| name == "config.json") {
            return Ok(None);
        }
        Ok(Some(
            self.files(&snapshot, selection.small.into_iter().chain(weights)),
        ))
    }

    fn fetch(&self) -> Result<ModelFiles> {
        let endpoint = http::parse(&self.options.endpoint, "HF_ENDPOINT")?;
        let hub = Hub::new(self, endpoint)?;
        let commit = hub.commit()?;
        let listed = hub.list(&commit)?;
        let mut names: Vec<String> = listed.iter().map(|file| file.name.clone()).collect();
        names.sort();
        let selection = names::select(&names, self.file, self.id)?;
        let snapshot = self.snapshot(&commit);
        let fetch = |chosen: &[String]| -> Result<()> {
            chosen
                .iter()
                .try_for_each(|name| match listed.iter().find(|file| file.name == *name) {
                    Some(file) => hub.fetch(file, &commit, &snapshot),
                    None => Err(Error::not_found(name.clone(), self.id, "")),
                })
        };
        // The weights come last: a snapshot that has them has everything.
        fetch(&selection.small)?;
        let weights = self.weights(&selection, &snapshot, &names)?;
        fetch(&weights)?;
        self.remember(&commit)?;
        Ok(self.files(&snapshot, selection.small.into_iter().chain(weights)))
    }

    /// The files of a data set that `wanted` names: of the newest revision where the Hub can be reached, else those in
    /// the cache.
    pub(crate) fn resolve_some(&self, wanted: &dyn Fn(&str) -> bool) -> Result<ModelFiles> {
        let fetched = match self.options.offline {
            true => Err(Error::Offline {
                what: self.to_string(),
                hint: String::new(),
            }),
            false => self.fetch_some(wanted),
        };
        let error = match fetched {
            Err(error) if self.options.offline || is_outage(&error) => error,
            other => return other,
        };
        // Which files the data set has is known to the Hub alone: all that fit and were fetched before are taken.
        let commit = match is_commit(self.revision) {
            true => self.revision.to_owned(),
            false => {
                std::fs::read_to_string(self.folder().join("refs").join(self.revision)).unwrap_or_default()
            }
        };
        let snapshot = self.snapshot(commit.trim());
        if !is_commit(commit.trim()) || !snapshot.is_dir() {
            return Err(error);
        }
        let cached = ModelFiles::from_dir(&snapshot)?;
        let names: Vec<String> = cached
            .names()
            .filter(|name| wanted(name))
            .map(str::to_owned)
            .collect();
        if names.is_empty() {
            return Err(error);
        }
        let notice = format!("{error}: taking {self} from the cache");
        self.options.progress.event(Event::Notice(&notice));
        Ok(self.files(&snapshot, names.into_iter()))
    }

    fn fetch_some(&self, wanted: &dyn Fn(&str) -> bool) -> Result<ModelFiles> {
        let hub = Hub::new(self, http::parse(&self.options.endpoint, "HF_ENDPOINT")?)?;
        let commit = hub.commit()?;
        let mut listed = hub.list(&commit)?;
        listed.sort_by(|one, other| one.name.cmp(&other.name));
        let all: Vec<String> = listed.iter().map(|file| file.name.clone()).collect();
        listed.retain(|file| wanted(&file.name));
        if listed.is_empty() {
            let hint = format!("it has {}", names::listed(&all));
            return Err(Error::not_found("a file that fits", self.to_string(), hint));
        }
        let snapshot = self.snapshot(&commit);
        listed
            .iter()
            .try_for_each(|file| hub.fetch(file, &commit, &snapshot))?;
        self.remember(&commit)?;
        Ok(self.files(&snapshot, listed.into_iter().map(|file| file.name)))
    }

    /// Notes which commit the revision stands for.
    fn remember(&self, commit: &str) -> Result<()> {
        if self.revision == commit {
            return Ok(());
        }
        let path = self.folder().join("refs").join(self.revision);
        if std::fs::read_to_string(&path).is_ok_and(|known| known.trim() == commit) {
            tracing::debug!(repo = self.id, commit, "the cache has the newest revision");
            return Ok(());
        }
        download::write_whole(&path, commit.as_bytes())
    }

    /// The weight files of a selection, by the index in the snapshot where there is one.
    fn weights(&self, selection: &Selection, snapshot: &Path, names: &[String]) -> Result<Vec<String>> {
        match &selection.weights {
            Weights::Files(files) => Ok(files.clone()),
            Weights::Index(index) => {
                let path = snapshot.join(index);
                let bytes = std::fs::read(&path).map_err(Error::io(&path))?;
                names::shards(&bytes, &format!("{}/{index}", self.id), names)
            }
        }
    }

    fn files(&self, snapshot: &Path, names: impl Iterator<Item = String>) -> ModelFiles {
        ModelFiles::from_paths(
            &self.to_string(),
            names.map(|name| (name.clone(), snapshot.join(name))),
        )
    }

    fn folder(&self) -> PathBuf {
        self.options.hub_cache.join(format!(
            "{}--{}",
            self.kind.any().plural(),
            self.id.replace('/', "--")
        ))
    }

    fn snapshot(&self, commit: &str) -> PathBuf {
        self.folder().join("snapshots").join(commit)
    }
}

impl std::fmt::Display for Repo<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.id)?;
        if self.revision != MAIN {
            write!(f, "@{}", self.revision)?;
        }
        match self.file {
            Some(file) => write!(f, ":{file}"),
            None => Ok(()),
        }
    }
}

/// The revision that is meant when none is named.
pub(crate) const MAIN: &str = "main";

/// The clients of one repository.
struct Hub<'a> {
    repo: &'a Repo<'a>,
    endpoint: Url,
    /// Asks once: whether the Hub can be reached is to be known soon.
    first: HFClient,
    client: HFClient,
    plain: reqwest::Client,
    token: Option<String>,
}

impl<'a> Hub<'a> {
    fn new(repo: &'a Repo<'a>, endpoint: Url) -> Result<Self> {
        let options = repo.options;
        let token = options.token.clone();
        let plain = http::client(options, false)?;
        let build = |retries: usize| {
            let mut builder = HFClient::builder()
                .endpoint(&options.endpoint)
                .cache_dir(&options.hub_cache)
                .client(plain.clone())
                .retry_max_attempts(retries);
            if let Some(token) = &token {
                builder = builder.token(token);
            }
            builder
                .build()
                .map_err(|error| translate(&error, &endpoint, repo.id))
        };
        Ok(Self {
            repo,
            first: build(0)?,
            client: build(options.retries as usize)?,
            plain,
            token,
            endpoint,
        })
    }

    /// The commit that the revision stands for now: the first question, which finds out whether the Hub can
    /// be reached.
    fn commit(&self) -> Result<String> {
        let (owner, name) = split_id(self.repo.id);
        // Resolving, connecting and a first answer: a little more than connecting alone.
        let patience = self.repo.options.connect_timeout.mul_f32(1.25);
        let sha = http::block_on(async || {
            let revision = self.repo.revision;
            let info = async {
                match self.repo.kind {
                    RepoKind::Model => {
                        let model = self.first.model(owner, name);
                        model.info().revision(revision).send().await.map(|info| info.sha)
                    }
                    RepoKind::Dataset => {
                        let dataset = self.first.dataset(owner, name);
                        dataset
                            .info()
                            .revision(revision)
                            .send()
                            .await
                            .map(|info| info.sha)
                    }
                }
            };
            match tokio::time::timeout(patience, info).await {
                Ok(sha) => sha.map_err(|error| self.translate(&error)),
                Err(_) => Err(http::silent(&self.endpoint)),
            }
        })?;
        match sha {
            Some(sha) if is_commit(&sha) => Ok(sha),
            sha => Err(Error::format(
                self.repo.id,
                format!("the Hub names the commit {sha:?}, not 40 hexadecimal digits"),
            )),
        }
    }

    fn list(&self, commit: &str) -> Result<Vec<Listed>> {
        let (owner, name) = split_id(self.repo.id);
        let entries: Vec<RepoTreeEntry> = http::block_on(async || {
            let repository = self.client.repository(self.repo.kind.any(), owner, name);
            let tree = repository
                .list_tree()
                .revision(commit)
                .recursive(true)
                .limit(MAX_ENTRIES)
                .send();
            tree.map_err(|error| self.translate(&error))?
                .try_collect()
                .await
                .map_err(|error| self.translate(&error))
        })?;
        let files = entries.into_iter().filter_map(|entry| match entry {
            RepoTreeEntry::File {
                oid, size, path, lfs, ..
            } => Some(Listed {
                name: path,
                size,
                oid,
                large: lfs.is_some(),
            }),
            RepoTreeEntry::Directory { .. } => None,
        });
        // A colon is harmless here and a drive elsewhere: such files are left out, not the whole model.
        let files = files.filter(|file| !file.name.contains(':'));
        files
            .map(|file| {
                names::safe(&file.name, self.repo.id)?;
                Ok(file)
            })
            .collect()
    }

    /// Brings one file into the snapshot.
    fn fetch(&self, file: &Listed, commit: &str, snapshot: &Path) -> Result<()> {
        let pointer = snapshot.join(&file.name);
        if pointer.is_file() {
            return Ok(());
        }
        let address = self.address(commit, &file.name)?;
        let id = if file.large {
            self.sha256(&address, &file.name)?
        } else {
            file.oid.to_ascii_lowercase()
        };
        let Some(checksum) = Checksum::of_name(&id, file.size) else {
            return Err(Error::format(
                self.describe(&file.name),
                format!("the Hub gives {id:?} for a checksum"),
            ));
        };
        let folder = self.repo.folder();
        let blob = folder.join("blobs").join(&id);
        let locks = self
            .repo
            .options
            .hub_cache
            .join(".locks")
            .join(folder.file_name().unwrap_or_default());
        let shown = self.describe(&file.name);
        let download = Download {
            file: &shown,
            target: &blob,
            lock: &locks.join(format!("{id}.lock")),
            size: Some(file.size),
            checksum: Some(checksum),
            options: self.repo.options,
        };
        download.run(&|offset, failed| self.open(file, commit, &address, offset, failed).boxed())?;
        // Two processes may get here at once; the pointers are as short a matter as the lock.
        let _lock = Lock::acquire(&locks.join("snapshots.lock"), &shown, self.repo.options)?;
        point(&pointer, &blob)
    }

    /// The bytes of a file, through the Hub's own client, and plainly if that has failed before (or does
    /// not resume as asked).
    async fn open(
        &self,
        file: &Listed,
        commit: &str,
        address: &Url,
        offset: u64,
        failed: u32,
    ) -> Result<Body> {
        let shown = self.describe(&file.name);
        if failed > 0 || file.size == 0 {
            return http::get(&self.plain, address, self.token.as_deref(), offset, &shown).await;
        }
        let (owner, name) = split_id(self.repo.id);
        let range = (offset > 0).then_some(offset..file.size);
        // The one type for both kinds asks in the wrong place (hf-hub 1.0).
        let stream = match self.repo.kind {
            RepoKind::Model => {
                let model = self.first.model(owner, name);
                let request = model.download_file_stream().filename(&file.name).revision(commit);
                request
                    .maybe_range(range)
                    .send()
                    .await
                    .map(|(_, stream)| stream.boxed())
            }
            RepoKind::Dataset => {
                let dataset = self.first.dataset(owner, name);
                let request = dataset
                    .download_file_stream()
                    .filename(&file.name)
                    .revision(commit);
                request
                    .maybe_range(range)
                    .send()
                    .await
                    .map(|(_, stream)| stream.boxed())
            }
        };
        let stream = stream.map_err(|error| self.translate(&error))?;
        let (endpoint, id) = (self.endpoint.clone(), self.repo.id.to_owned());
        let stream = stream.map(move |chunk| chunk.map_err(|error| translate(&error, &endpoint, &id)));
        Ok(Body {
            offset,
            total: Some(file.size),
            stream: stream.boxed(),
        })
    }

    /// The SHA-256 of a large file: the tag of the answer that leads to it.
    fn sha256(&self, address: &Url, name: &str) -> Result<String> {
        let client = http::client(self.repo.options, true)?;
        let shown = self.describe(name);
        http::block_on(async || {
            let mut request = client.head(address.clone());
            if let Some(token) = &self.token {
                request = request.bearer_auth(token);
            }
            let answer = request
                .send()
                .await
                .map_err(|error| http::failure(address, &error))?;
            let answer = if answer.status().is_redirection() {
                answer
            } else {
                http::check(answer, &shown)?
            };
            let headers = answer.headers();
            let tag = headers
                .get("x-linked-etag")
                .or_else(|| headers.get(ETAG))
                .and_then(|tag| tag.to_str().ok());
            let id = tag.map(|tag| {
                tag.trim_start_matches("W/")
                    .trim_matches('"')
                    .to_ascii_lowercase()
            });
            match id {
                Some(id) if id.len() == 64 => Ok(id),
                _ => Err(Error::format(
                    shown,
                    format!("the Hub gives no SHA-256 of it (tag {tag:?})"),
                )),
            }
        })
    }

    /// `ENDPOINT/[datasets/]REPO/resolve/COMMIT/FILE`, each part escaped.
    fn address(&self, commit: &str, name: &str) -> Result<Url> {
        let mut url = self.endpoint.clone();
        let id = format!("{}{}", self.repo.kind.any().url_prefix(), self.repo.id);
        let parts = id.split('/').chain(["resolve", commit]).chain(name.split('/'));
        match url.path_segments_mut() {
            Ok(mut path) => {
                path.pop_if_empty().extend(parts);
            }
            Err(()) => return Err(Error::format("HF_ENDPOINT", "is not an address with a path")),
        }
        Ok(url)
    }

    fn describe(&self, name: &str) -> String {
        format!("{}/{name}", self.repo.id)
    }

    fn translate(&self, error: &HFError) -> Error {
        translate(error, &self.endpoint, self.repo.id)
    }
}

/// True when the Hub is out of reach or out of order, so that an older copy is better than nothing.
fn is_outage(error: &Error) -> bool {
    matches!(
        error,
        Error::Unreachable { .. }
            | Error::Network {
                status: None | Some(429 | 500..),
                ..
            }
    )
}

fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

fn translate(error: &HFError, endpoint: &Url, id: &str) -> Error {
    let status = |status: u16, said: &Option<String>| Error::Network {
        url: http::shown(endpoint),
        status: Some(status),
        reason: format!(
            "HTTP {status} for {id}{}",
            said.as_ref().map(|said| format!(": {said}")).unwrap_or_default()
        ),
    };
    match error {
        HFError::Request { source, .. } => http::failure(endpoint, source),
        // The Hub does not tell private repositories from missing ones.
        HFError::AuthRequired { .. } => Error::not_found(
            id,
            http::shown(endpoint),
            "check the name; for a private or gated model set HF_TOKEN",
        ),
        HFError::Forbidden { .. } => Error::Denied {
            what: id.into(),
            status: 403,
        },
        HFError::RepoNotFound { .. } => Error::not_found(id, http::shown(endpoint), "check the name"),
        HFError::RevisionNotFound { revision, .. } => Error::not_found(
            format!("{id}@{revision}"),
            http::shown(endpoint),
            "check the name and the revision",
        ),
        HFError::EntryNotFound { path, .. } => Error::not_found(path.clone(), id, ""),
        HFError::RateLimited { context, .. } => status(429, &context.server_message),
        HFError::Http { context } => status(context.status.as_u16(), &context.server_message),
        other => Error::Network {
            url: http::shown(endpoint),
            status: None,
            reason: other.to_string(),
        },
    }
}

/// Makes `pointer` lead to `blob`: a relative link, or a second name of the file where links are a privilege.
fn point(pointer: &Path, blob: &Path) -> Result<()> {
    download::create_parent(pointer)?;
    let part = download::beside(pointer);
    link(pointer, blob, &part)
        .and_then(|()| std::fs::rename(&part, pointer))
        .map_err(Error::io(pointer))
}

#[cfg(unix)]
fn link(pointer: &Path, blob: &Path, part: &Path) -> std::io::Result<()> {
    // REPO/snapshots/COMMIT/a/b → ../../../../blobs/ID: up from the pointer's folder to REPO.
    let repo = blob.parent().and_then(Path::parent).unwrap_or(Path::new("/"));
    let depth = pointer
        .strip_prefix(repo)
        .map_or(0, |inside| inside.components().count());
    let mut target: PathBuf = std::iter::repeat_n("..", depth.saturating_sub(1)).collect();
    target.push("blobs");
    target.push(blob.file_name().unwrap_or_default());
    std::os::unix::fs::symlink(target, part)
}

#[cfg(not(unix))]
fn link(_: &Path, blob: &Path, part: &Path) -> std::io::Result<()> {
    std::fs::hard_link(blob, part).or_else(|_| std::fs::copy(blob, part).map(drop))
}
