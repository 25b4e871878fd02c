//! A small HTTP server that can break off, be slow, ignore ranges and redirect, and that remembers what it
//! was asked.

use std::collections::{HashMap, VecDeque};
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// What is answered for one path.
#[derive(Clone, Default)]
pub struct Route {
    pub body: Vec<u8>,
    pub headers: Vec<(String, String)>,
    /// 200 when 0.
    pub status: u16,
    /// Answers the whole file whatever range is asked for.
    pub no_ranges: bool,
    /// Waits this long after every 16 KiB.
    pub pace: Duration,
    /// The next answers break off after so many bytes.
    pub cuts: VecDeque<usize>,
    /// An answer that breaks off stays silent for this long first.
    pub hang: Duration,
}

impl Route {
    pub fn new(body: impl Into<Vec<u8>>) -> Self {
        Self {
            body: body.into(),
            ..Self::default()
        }
    }

    pub fn json(value: &serde_json::Value) -> Self {
        Self::new(value.to_string()).header("Content-Type", "application/vnd.pypi.simple.v1+json")
    }

    pub fn header(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.into(), value.into()));
        self
    }

    pub fn redirect(to: &str) -> Self {
        Self {
            status: 302,
            ..Self::default()
        }
        .header("Location", to)
    }

    pub fn cut(mut self, at: impl IntoIterator<Item = usize>) -> Self {
        self.cuts.extend(at);
        self
    }

    pub fn pace(mut self, pace: Duration) -> Self {
        self.pace = pace;
        self
    }
}

/// A request that was answered.
#[derive(Debug, Clone)]
pub struct Request {
    pub method: String,
    pub path: String,
    pub headers: HashMap<String, String>,
}

pub struct Server {
    pub url: String,
    routes: Arc<Mutex<HashMap<String, Route>>>,
    log: Arc<Mutex<Vec<Request>>>,
    stop: Arc<AtomicBool>,
}

impl Server {
    pub fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (routes, log) = (
            Arc::<Mutex<HashMap<String, Route>>>::default(),
            Arc::<Mutex<Vec<Request>>>::default(),
        );
        let stop = Arc::new(AtomicBool::new(false));
        let (state, entries, stopped) = (routes.clone(), log.clone(), stop.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                if stopped.load(Ordering::SeqCst) {
                    break;
                }
                let (state, entries) = (state.clone(), entries.clone());
                std::thread::spawn(move || {
                    stream
                        .ok()
                        .and_then(|stream| answer(stream, &state, &entries).ok())
                });
            }
        });
        Self {
            url,
            routes,
            log,
            stop,
        }
    }

    pub fn route(&self, path: &str, route: Route) {
        self.routes.lock().unwrap().insert(path.into(), route);
    }

    /// The requests so far.
    pub fn log(&self) -> Vec<Request> {
        self.log.lock().unwrap().clone()
    }

    /// How often a path was asked for with GET.
    pub fn count(&self, path: &str) -> usize {
        self.log()
            .iter()
            .filter(|request| request.method == "GET" && request.path == path)
            .count()
    }
}

impl Drop for Server {
    /// Gives the port back: connecting to it is refused from now on.
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(self.url.trim_start_matches("http://"));
    }
}

fn answer(
    mut stream: TcpStream,
    routes: &Mutex<HashMap<String, Route>>,
    log: &Mutex<Vec<Request>>,
) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let mut words = line.split_whitespace();
    let (method, target) = (
        words.next().unwrap_or("").to_owned(),
        words.next().unwrap_or("").to_owned(),
    );
    let path = target.split('?').next().unwrap_or("").to_owned();
    let mut headers = HashMap::new();
    loop {
        line.clear();
        if reader.read_line(&mut line)? == 0 || line.trim().is_empty() {
            break;
        }
        if let Some((name, value)) = line.split_once(':') {
            headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
        }
    }
    log.lock().unwrap().push(Request {
        method: method.clone(),
        path: path.clone(),
        headers: headers.clone(),
    });
    let (route, cut) = match routes.lock().unwrap().get_mut(&path) {
        // Only what is read can break off.
        Some(route) => {
            let cut = if method == "GET" {
                route.cuts.pop_front()
            } else {
                None
            };
            (route.clone(), cut)
        }
        None => (
            Route {
                status: 404,
                ..Route::default()
            },
            None,
        ),
    };
    let total = route.body.len();
    let mut status = if route.status == 0 { 200 } else { route.status };
    let mut start = 0;
    let mut extra = String::new();
    if let Some(range) = headers.get("range").filter(|_| !route.no_ranges && status == 200) {
        let (first, last) = range.trim_start_matches("bytes=").split_once('-').unwrap();
        assert!(last.is_empty() || last.parse() == Ok(total - 1), "{range}");
        start = first.parse().unwrap();
        if start >= total {
            (status, start) = (416, total);
        } else {
            status = 206;
            extra = format!("Content-Range: bytes {start}-{}/{total}\r\n", total - 1);
        }
    }
    for (name, value) in &route.headers {
        extra += &format!("{name}: {value}\r\n");
    }
    let body = &route.body[start..];
    write!(
        stream,
        "HTTP/1.1 {status} X\r\nContent-Length: {}\r\nConnection: close\r\n{extra}\r\n",
        body.len()
    )?;
    if method == "HEAD" {
        return Ok(());
    }
    let end = cut.map_or(body.len(), |cut| cut.min(body.len()));
    for chunk in body[..end].chunks(16 << 10) {
        stream.write_all(chunk)?;
        stream.flush()?;
        std::thread::sleep(route.pace);
    }
    if cut.is_some() {
        std::thread::sleep(route.hang);
    }
    Ok(())
}
