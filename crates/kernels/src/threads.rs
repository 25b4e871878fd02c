//! The threads that kernels run on.
//!
//! A decoding step is some hundred short parallel sections, a few microseconds of work each, so the hand-over
//! counts: workers wait awake for a moment before they sleep, tasks are taken from both ends of a shared queue, and the
//! caller never waits for a worker that has not begun. A worker whose core is taken away by another process
//! costs the task it is at, not the whole section; where that happens, the caller works alone for a while.

#[cfg(not(target_arch = "wasm32"))]
pub use native::{for_each, in_background, num_threads, set_num_threads};

/// Calls `task` with `0..tasks`.
#[cfg(target_arch = "wasm32")]
pub fn for_each(tasks: usize, task: impl Fn(usize) + Sync) {
    (0..tasks).for_each(task);
}

/// Runs what may as well be left undone on a thread of its own, where there are threads.
#[cfg(target_arch = "wasm32")]
pub fn in_background(_work: impl FnOnce() + Send + 'static) {}

/// Threads that work on a parallel section.
#[cfg(target_arch = "wasm32")]
pub fn num_threads() -> usize {
    1
}

/// Splits `0..len` into pieces of at least `min` for [`for_each`]: a few for each thread, so that the quick
/// ones can take over from the slow ones. Returns the number of pieces and the length of each but the last.
pub fn pieces(len: usize, min: usize) -> (usize, usize) {
    let most = 4 * num_threads();
    let size = len.div_ceil(most).max(min).max(1);
    (len.div_ceil(size), size)
}

/// Calls `task` with the chunks of `values` that are `size` long (the last may be shorter) and their indices.
pub fn for_each_chunk<T: Send>(values: &mut [T], size: usize, task: impl Fn(usize, &mut [T]) + Sync) {
    struct Start<T>(*mut T);
    // SAFETY: see below.
    unsafe impl<T: Send> Sync for Start<T> {}
    impl<T> Start<T> {
        fn at(&self, index: usize) -> *mut T {
            self.0.wrapping_add(index)
        }
    }
    let (len, start) = (values.len(), Start(values.as_mut_ptr()));
    for_each(len.div_ceil(size.max(1)), |index| {
        let range = index * size..((index + 1) * size).min(len);
        // SAFETY: the range lies within the values, and no other task has any of it.
        let chunk = unsafe { std::slice::from_raw_parts_mut(start.at(range.start), range.len()) };
        task(index, chunk);
    });
}

#[cfg(not(target_arch = "wasm32"))]
mod native {
    use std::cell::Cell;
    use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
    use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
    use std::sync::{Mutex, OnceLock};
    use std::thread::{self, Thread};
    use std::time::{Duration, Instant};

    /// How long a worker waits awake for the next section.
    const AWAKE: Duration = Duration::from_micros(200);
    /// Turns of a waiting loop between looks at the clock.
    const TURNS: usize = 64;
    /// A worker that is at its last task so much longer than the caller's tasks take has lost its core.
    const LATE: Duration = Duration::from_micros(200);
    /// How long the caller then works alone.
    const ALONE: Duration = Duration::from_millis(20);

    static POOL: OnceLock<Pool> = OnceLock::new();
    static WANTED: AtomicUsize = AtomicUsize::new(0);

    thread_local! {
        /// Set while this thread runs a task: a section within a section runs on the thread itself.
        static BUSY: Cell<bool> = const { Cell::new(false) };
    }

    struct Pool {
        threads: usize,
        /// Held by the caller whose section runs.
        turn: Mutex<()>,
        section: Section,
        sleepers: Mutex<Vec<Thread>>,
        sleeping: AtomicUsize,
        began: Instant,
        /// Until when the caller works alone, in nanoseconds since `began`; 0 for no such time.
        alone: AtomicU64,
    }

    /// The section that runs. Workers enter by counting themselves in and then looking whether it is open; the
    /// caller closes it and then waits until nobody is in.
    struct Section {
        number: AtomicUsize,
        open: AtomicBool,
        inside: AtomicUsize,
        /// How many tasks have been taken: by the caller from the front, by workers from the back, so that each thread
        /// reads what lies in a row.
        taken: AtomicUsize,
        front: AtomicUsize,
        back: AtomicUsize,
        tasks: AtomicUsize,
        /// The address of a [`Task`] on the caller's stack.
        task: AtomicUsize,
        panicked: AtomicBool,
    }

    type Task<'a> = &'a (dyn Fn(usize) + Sync);

    /// Sets the number of threads, the caller included; works once, before anything has run. Returns whether it
    /// took effect.
    pub fn set_num_threads(threads: usize) -> bool {
        WANTED.store(threads.max(1), Ordering::SeqCst);
        pool().threads == threads.max(1)
    }

    /// Threads that work on a parallel section, the caller included.
    pub fn num_threads() -> usize {
        pool().threads
    }

    /// Calls `task` with `0..tasks`, on as many threads as are at hand; returns when all are done. Where another
    /// thread has a section running, or from within a task, everything runs on the calling thread.
    ///
    /// # Panics
    /// Where a task does.
    pub fn for_each(tasks: usize, task: impl Fn(usize) + Sync) {
        let pool = pool();
        let turn = if tasks > 1 && pool.threads > 1 && !BUSY.get() && !pool.is_alone() {
            pool.turn.try_lock().ok()
        } else {
            None
        };
        match turn {
            Some(_turn) => pool.run(tasks, &task),
            None => (0..tasks).for_each(task),
        }
    }

    /// Runs what may as well be left undone on a thread of its own, where there are threads.
    pub fn in_background(work: impl FnOnce() + Send + 'static) {
        // Without the thread it is left undone.
        let _ = thread::Builder::new().name("in advance".into()).spawn(work);
    }

    fn pool() -> &'static Pool {
        POOL.get_or_init(|| {
            let cores = thread::available_parallelism().map_or(1, usize::from);
            let threads = match WANTED.load(Ordering::SeqCst) {
                0 => cores,
                wanted => wanted,
            };
            for _ in 1..threads {
                // Without this worker the others do its share.
                let _ = thread::Builder::new().name("kernels".into()).spawn(work);
            }
            Pool {
                threads,
                turn: Mutex::new(()),
                section: Section {
                    number: AtomicUsize::new(0),
                    open: AtomicBool::new(false),
                    inside: AtomicUsize::new(0),
                    taken: AtomicUsize::new(0),
                    front: AtomicUsize::new(0),
                    back: AtomicUsize::new(0),
                    tasks: AtomicUsize::new(0),
                    task: AtomicUsize::new(0),
                    panicked: AtomicBool::new(false),
                },
                sleepers: Mutex::new(Vec::new()),
                sleeping: AtomicUsize::new(0),
                began: Instant::now(),
                alone: AtomicU64::new(0),
            }
        })
    }

    impl Pool {
        fn is_alone(&self) -> bool {
            let until = self.alone.load(Ordering::Relaxed);
            if until == 0 || u128::from(until) > self.began.elapsed().as_nanos() {
                return until != 0;
            }
            self.alone.store(0, Ordering::Relaxed);
            false
        }

        fn run(&self, tasks: usize, task: Task) {
            let s = &self.section;
            s.task.store(std::ptr::from_ref(&task).addr(), Ordering::Relaxed);
            // Kept for workers to get their pointer back from an address.
            std::ptr::from_ref(&task).expose_provenance();
            s.tasks.store(tasks, Ordering::Relaxed);
            s.taken.store(0, Ordering::Relaxed);
            s.front.store(0, Ordering::Relaxed);
            s.back.store(0, Ordering::Relaxed);
            s.panicked.store(false, Ordering::Relaxed);
            s.open.store(true, Ordering::SeqCst);
            s.number.fetch_add(1, Ordering::SeqCst);
            if self.sleeping.load(Ordering::SeqCst) > 0
                && let Ok(mut sleepers) = self.sleepers.lock()
            {
                sleepers.drain(..).for_each(|thread| thread.unpark());
            }
            BUSY.set(true);
            let begin = Instant::now();
            let done = catch_unwind(AssertUnwindSafe(|| s.take(tasks, task, true)));
            let own = begin.elapsed();
            BUSY.set(false);
            s.taken.fetch_max(tasks, Ordering::SeqCst);
            s.open.store(false, Ordering::SeqCst);
            // Nobody may still use `task` when it goes out of scope.
            let mut turns = 0usize;
            while s.inside.load(Ordering::SeqCst) > 0 {
                turns += 1;
                if turns.is_multiple_of(TURNS * TURNS) {
                    // Its core may have been taken away.
                    thread::yield_now();
                } else {
                    std::hint::spin_loop();
                }
            }
            match done {
                Ok(done) => {
                    let task = own / u32::try_from(done).unwrap_or(u32::MAX).max(1);
                    if turns > TURNS && begin.elapsed() > own + 2 * task + LATE {
                        let until = self.began.elapsed() + ALONE;
                        self.alone.store(until.as_nanos() as u64, Ordering::Relaxed);
                    }
                }
                Err(panic) => resume_unwind(panic),
            }
            assert!(
                !s.panicked.load(Ordering::SeqCst),
                "a task panicked on another thread"
            );
        }

        /// Waits for a section other than `seen` and returns its number.
        fn wait(&self, seen: usize) -> usize {
            let number = &self.section.number;
            let mut since = None;
            loop {
                for _ in 0..TURNS {
                    let now = number.load(Ordering::SeqCst);
                    if now != seen {
                        return now;
                    }
                    std::hint::spin_loop();
                }
                if since.get_or_insert_with(Instant::now).elapsed() < AWAKE {
                    continue;
                }
                if let Ok(mut sleepers) = self.sleepers.lock() {
                    sleepers.push(thread::current());
                }
                self.sleeping.fetch_add(1, Ordering::SeqCst);
                // A section that began in between has not seen this sleeper.
                while number.load(Ordering::SeqCst) == seen {
                    thread::park();
                }
                self.sleeping.fetch_sub(1, Ordering::SeqCst);
                if let Ok(mut sleepers) = self.sleepers.lock() {
                    let own = thread::current().id();
                    sleepers.retain(|thread| thread.id() != own);
                }
                since = None;
            }
        }
    }

    impl Section {
        /// Runs tasks until all are taken; returns how many.
        fn take(&self, tasks: usize, task: Task, is_caller: bool) -> usize {
            for done in 0.. {
                if self.taken.fetch_add(1, Ordering::Relaxed) >= tasks {
                    return done;
                }
                task(match is_caller {
                    true => self.front.fetch_add(1, Ordering::Relaxed),
                    false => tasks - 1 - self.back.fetch_add(1, Ordering::Relaxed),
                });
            }
            tasks
        }
    }

    /// What a worker does all its life.
    fn work() {
        BUSY.set(true);
        let pool = pool();
        let s = &pool.section;
        let mut seen = 0;
        loop {
            seen = pool.wait(seen);
            s.inside.fetch_add(1, Ordering::SeqCst);
            if s.open.load(Ordering::SeqCst) {
                let task: *const Task = std::ptr::with_exposed_provenance(s.task.load(Ordering::Relaxed));
                let tasks = s.tasks.load(Ordering::Relaxed);
                // SAFETY: the section was open after this thread counted itself in, so its caller waits for
                // this thread before it lets go of the task.
                let task = unsafe { *task };
                if catch_unwind(AssertUnwindSafe(|| s.take(tasks, task, false))).is_err() {
                    s.panicked.store(true, Ordering::SeqCst);
                    s.taken.fetch_max(tasks, Ordering::SeqCst);
                }
            }
            s.inside.fetch_sub(1, Ordering::SeqCst);
        }
    }
}

#[cfg(all(test, not(target_arch = "wasm32")))]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    fn counts(tasks: usize) {
        let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
        for_each(tasks, |index| {
            counts[index].fetch_add(1, Ordering::Relaxed);
            // A section within a section.
            for_each(2, |_| ());
        });
        assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1));
    }

    #[test]
    fn every_task_runs_once() {
        for round in 0..2000 {
            counts(round % 37);
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
        counts(1000);
    }

    #[test]
    fn many_callers() {
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..500).for_each(counts));
            }
        });
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        for bad in [0, 63] {
            let result = std::panic::catch_unwind(|| for_each(64, |index| assert_ne!(index, bad)));
            assert!(result.is_err());
        }
        counts(64);
    }

    #[test]
    fn chunks_cover_everything() {
        for (len, size) in [(0, 4), (1, 4), (12, 4), (1001, 7)] {
            let mut values = vec![0.0; len];
            for_each_chunk(&mut values, size, |index, chunk| {
                chunk.iter_mut().for_each(|value| *value += 1.0 + index as f32);
            });
            let expected = (0..len).map(|i| 1.0 + (i / size) as f32);
            assert_eq!(values, expected.collect::<Vec<_>>());
        }
    }

    #[test]
    fn pieces_cover_everything() {
        for (len, min) in [(0, 1), (1, 1), (1000, 1), (1000, 64), (7, 100)] {
            let (count, size) = pieces(len, min);
            assert!(count * size >= len && (count == 0 || (count - 1) * size < len));
        }
    }
}
