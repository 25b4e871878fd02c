//! The one HTTP stack: the same `reqwest` that the Hub's client uses.

use std::error::Error as _;
use std::sync::OnceLock;

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::BoxStream;
use reqwest::header::{ACCEPT_ENCODING, CONTENT_RANGE, RANGE};
use reqwest::{Client, Response, StatusCode};
use url::Url;

use crate::{Error, FetchOptions, Result};

/// The bytes of a file from `offset` on.
pub(crate) struct Body {
    /// Where the bytes begin: 0 when the server does not resume.
    pub offset: u64,
    /// Length of the whole file, if known.
    pub total: Option<u64>,
    pub stream: BoxStream<'static, Result<Bytes>>,
}

/// Runs a future to its end, from synchronous code and from within another runtime alike.
///
/// The runtime is never dropped: dropping it would wait for name look-ups that nobody needs any more.
pub(crate) fn block_on<T: Send>(make: impl AsyncFnOnce() -> Result<T> + Send) -> Result<T> {
    static RUNTIME: OnceLock<std::io::Result<tokio::runtime::Runtime>> = OnceLock::new();
    let made = RUNTIME.get_or_init(|| {
        tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("fetch")
            .enable_all()
            .build()
    });
    let runtime = made.as_ref().map_err(|error| Error::Io {
        path: "network threads".into(),
        source: std::io::Error::new(error.kind(), error.to_string()),
    })?;
    if tokio::runtime::Handle::try_current().is_err() {
        return runtime.block_on(make());
    }
    std::thread::scope(|scope| scope.spawn(|| runtime.block_on(make())).join())
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// A client with the time limits and certificates of `options`. With `leave`, redirections to another host
/// are not followed: the Hub says a file's checksum in the answer that redirects.
pub(crate) fn client(options: &FetchOptions, leave: bool) -> Result<Client> {
    let mut builder = Client::builder()
        .user_agent(concat!("oxiformers/", env!("CARGO_PKG_VERSION")))
        .connect_timeout(options.connect_timeout)
        .read_timeout(options.read_timeout);
    if leave {
        builder = builder.redirect(reqwest::redirect::Policy::custom(|attempt| {
            let host = |url: &Url| (url.host_str().map(str::to_owned), url.port_or_known_default());
            let same = attempt
                .previous()
                .last()
                .is_some_and(|from| host(from) == host(attempt.url()));
            if same && attempt.previous().len() < 10 {
                attempt.follow()
            } else {
                attempt.stop()
            }
        }));
    }
    if let Some(path) = &options.certificates {
        let pem = std::fs::read(path).map_err(Error::io(path))?;
        let certificates = reqwest::Certificate::from_pem_bundle(&pem).map_err(|error| {
            Error::format(
                path.display().to_string(),
                format!("is not a file of PEM certificates: {error}"),
            )
        })?;
        builder = builder.tls_certs_merge(certificates);
    }
    builder.build().map_err(|error| Error::Network {
        url: "HTTP client".into(),
        status: None,
        reason: causes(&error),
    })
}

/// A URL for messages: without user name and password, query and fragment.
pub(crate) fn shown(url: &Url) -> String {
    let mut url = url.clone();
    // Both fail only for addresses that have no host and so no credentials either.
    let _ = url.set_username("");
    let _ = url.set_password(None);
    url.set_query(None);
    url.set_fragment(None);
    url.into()
}

/// Parses an address that came from the options or from a server.
pub(crate) fn parse(text: &str, what: &str) -> Result<Url> {
    let url = Url::parse(text)
        .map_err(|error| Error::format(what, format!("{text:?} is not an address: {error}")))?;
    match url.scheme() {
        "http" | "https" => Ok(url),
        other => Err(Error::unsupported(
            what,
            format!("the scheme {other:?} of an address"),
            "use https",
        )),
    }
}

fn host(url: &Url) -> String {
    match (url.host_str(), url.port()) {
        (Some(host), Some(port)) => format!("{host}:{port}"),
        (Some(host), None) => host.to_owned(),
        _ => url.to_string(),
    }
}

/// What went wrong before or during an answer.
pub(crate) fn failure(url: &Url, error: &reqwest::Error) -> Error {
    if error.is_connect() {
        let reason = if error.is_timeout() {
            "no answer in time".to_owned()
        } else {
            root(error)
        };
        return Error::Unreachable {
            host: host(url),
            reason,
        };
    }
    Error::Network {
        url: shown(url),
        status: None,
        reason: causes(error),
    }
}

/// No answer to the first question within the time allowed.
pub(crate) fn silent(url: &Url) -> Error {
    Error::Unreachable {
        host: host(url),
        reason: "no answer in time".to_owned(),
    }
}

fn root(error: &reqwest::Error) -> String {
    let mut last: &dyn std::error::Error = error;
    while let Some(source) = last.source() {
        last = source;
    }
    last.to_string()
}

/// The error and what caused it. The address is left out: it may hold a password.
fn causes(error: &reqwest::Error) -> String {
    let kind = if error.is_timeout() {
        "timed out"
    } else if error.is_body() {
        "the transfer broke off"
    } else {
        "failed"
    };
    match error.source() {
        Some(_) => format!("{kind}: {}", root(error)),
        None => kind.to_owned(),
    }
}

/// Maps a status that is not a success; `what` is what was asked for.
pub(crate) fn check(response: Response, what: &str) -> Result<Response> {
    let status = response.status();
    if status.is_success() {
        return Ok(response);
    }
    Err(match status {
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Error::Denied {
            what: what.into(),
            status: status.as_u16(),
        },
        StatusCode::NOT_FOUND | StatusCode::GONE => Error::not_found(what, host(response.url()), ""),
        _ => Error::Network {
            url: shown(response.url()),
            status: Some(status.as_u16()),
            reason: format!("the server answered {status}"),
        },
    })
}

/// Asks for the bytes of `url` from `offset` on. A server that does not resume gives all of them.
pub(crate) async fn get(
    client: &Client,
    url: &Url,
    token: Option<&str>,
    offset: u64,
    what: &str,
) -> Result<Body> {
    let mut request = client.get(url.clone()).header(ACCEPT_ENCODING, "identity");
    if let Some(token) = token {
        request = request.bearer_auth(token);
    }
    if offset > 0 {
        request = request.header(RANGE, format!("bytes={offset}-"));
    }
    let response = request.send().await.map_err(|error| failure(url, &error))?;
    if response.status() == StatusCode::RANGE_NOT_SATISFIABLE && offset > 0 {
        return Box::pin(get(client, url, token, 0, what)).await;
    }
    let response = check(response, what)?;
    let (offset, total) = if response.status() == StatusCode::PARTIAL_CONTENT {
        let range = response
            .headers()
            .get(CONTENT_RANGE)
            .and_then(|value| value.to_str().ok());
        match range.and_then(parse_range) {
            Some((start, total)) if start == offset => (start, total),
            _ => {
                let reason = format!("asked for bytes from {offset} on, got the range {range:?}");
                return Err(Error::Network {
                    url: shown(url),
                    status: None,
                    reason,
                });
            }
        }
    } else {
        (0, response.content_length())
    };
    let url = url.clone();
    let stream = response
        .bytes_stream()
        .map(move |chunk| chunk.map_err(|error| failure(&url, &error)));
    Ok(Body {
        offset,
        total,
        stream: stream.boxed(),
    })
}

/// `bytes FIRST-LAST/TOTAL`: RFC 9110, section 14.4.
fn parse_range(text: &str) -> Option<(u64, Option<u64>)> {
    let (range, total) = text.strip_prefix("bytes ")?.split_once('/')?;
    Some((
        range.split_once('-')?.0.trim().parse().ok()?,
        total.trim().parse().ok(),
    ))
}

/// A whole answer as text, no longer than `limit` bytes.
pub(crate) async fn text(response: Response, limit: usize) -> Result<String> {
    let url = response.url().clone();
    let mut stream = response.bytes_stream();
    let mut all = Vec::new();
    while let Some(chunk) = stream.next().await {
        let chunk = chunk.map_err(|error| failure(&url, &error))?;
        if all.len() + chunk.len() > limit {
            return Err(Error::format(
                shown(&url),
                format!("the answer is longer than {limit} bytes"),
            ));
        }
        all.extend_from_slice(&chunk);
    }
    String::from_utf8(all).map_err(|_| Error::format(shown(&url), "the answer is not UTF-8 text"))
}
