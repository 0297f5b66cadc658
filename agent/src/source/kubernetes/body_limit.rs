//! No answer of an API server is taken in without end: it is held in memory as a whole, and who sends it may be another cluster's server.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
};

use http::{Request, Response};
use http_body_util::BodyExt as _;
use hyper::body::{Body, Bytes, Frame};
use tower::{BoxError, Layer, Service};

/// Bytes of an answer, or of a line of a watch, at the most: twenty times the largest object that Kubernetes takes.
pub(super) const MOST: usize = 32 << 20;

/// More than [`MOST`].
#[derive(Debug, thiserror::Error)]
#[error("an answer has more than {MOST} bytes")]
pub(super) struct TooLong;

impl TooLong {
    /// Whether an error comes from one.
    pub(super) fn is_behind(error: &(dyn std::error::Error + 'static)) -> bool {
        std::iter::successors(Some(error), |error| error.source()).any(|error| error.is::<Self>())
    }
}

/// An answer as it is taken in.
type Taken = Pin<Box<dyn Body<Data = Bytes, Error = BoxError> + Send>>;

/// Makes it so for all that a client asks.
#[derive(Clone, Copy, Debug)]
pub(super) struct BodyLimit;

impl<S> Layer<S> for BodyLimit {
    type Service = Bounding<S>;

    fn layer(&self, inner: S) -> Bounding<S> {
        Bounding { inner }
    }
}

#[derive(Clone, Debug)]
pub(super) struct Bounding<S> {
    inner: S,
}

impl<S, R, B> Service<Request<R>> for Bounding<S>
where
    S: Service<Request<R>, Response = Response<B>, Error = BoxError, Future: Send + 'static>,
    B: Body<Data = Bytes, Error: Into<BoxError>> + Send + 'static,
{
    type Response = Response<Taken>;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, BoxError>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<R>) -> Self::Future {
        let of_lines =
            request.uri().query().is_some_and(|query| query.split('&').any(|part| part.starts_with("watch=")));
        let answer = self.inner.call(request);
        Box::pin(async move {
            let answer = answer.await?;
            // What is wrong is taken in as a whole.
            let of_lines = of_lines && answer.status().is_success();
            Ok(answer.map(|body| -> Taken {
                Box::pin(Bounded { body: Box::pin(body.map_err(Into::into)), taken: 0, of_lines })
            }))
        })
    }
}

struct Bounded<B> {
    body: Pin<Box<B>>,
    /// Of the answer, or of the line that has begun.
    taken: usize,
    /// Whether each line is taken in for itself.
    of_lines: bool,
}

impl<B: Body<Data = Bytes, Error = BoxError>> Body for Bounded<B> {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let Some(frame) = ready!(self.body.as_mut().poll_frame(context)?) else { return Poll::Ready(None) };
        if let Some(data) = frame.data_ref() {
            let line = if self.of_lines { data.iter().rposition(|byte| *byte == b'\n') } else { None };
            self.taken = line.map_or(self.taken + data.len(), |end| data.len() - end - 1);
            if self.taken > MOST {
                return Poll::Ready(Some(Err(TooLong.into())));
            }
        }
        Poll::Ready(Some(Ok(frame)))
    }
}

#[cfg(test)]
mod tests {
    use futures::stream;
    use http_body_util::StreamBody;

    use super::*;

    async fn taken(parts: &[&'static str], times: usize, of_lines: bool) -> Result<usize, BoxError> {
        let parts: Vec<&'static str> = std::iter::repeat_n(parts, times).flatten().copied().collect();
        let frames = parts.into_iter().map(|part| Ok::<_, BoxError>(Frame::data(Bytes::from_static(part.as_bytes()))));
        let body = Box::pin(StreamBody::new(stream::iter(frames)));
        let mut bounded = Box::pin(Bounded { body, taken: 0, of_lines });
        let mut all = 0;
        while let Some(frame) = bounded.frame().await {
            all += frame?.data_ref().map_or(0, Bytes::len);
        }
        Ok(all)
    }

    #[tokio::test]
    async fn an_answer_is_bounded_as_a_whole_and_a_watch_line_by_line() {
        const KIB: &str = match str::from_utf8(&[b'x'; 1024]) {
            Ok(text) => text,
            Err(_) => panic!(),
        };
        let fitting = MOST / KIB.len();
        assert_eq!(taken(&[KIB], fitting, false).await.unwrap(), MOST);
        let error = taken(&[KIB, "\n"], fitting, false).await.unwrap_err();
        assert!(TooLong::is_behind(&*error), "{error}");
        assert_eq!(taken(&[KIB, "x\nx"], 2 * fitting, true).await.unwrap(), 2 * (MOST + 3 * fitting));
        assert!(taken(&[KIB], fitting + 1, true).await.is_err());
    }
}
