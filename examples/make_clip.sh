#!/bin/sh
# Makes clip.mp4 beside this file. Needs ffmpeg with libx264 and the fonts of Debian's fonts-dejavu-core.
#
# 40 s. Every frame shows its position by a clock and a bar that fills; the chord changes every 10 s.
# A keyframe every 2 s keeps seeking precise; faststart puts the index (moov) first, so play starts at byte 0.
# One encoder thread: with more, the rate limit makes the result differ by a few bytes from run to run.
set -eu
cd "$(dirname "$0")"

seconds=40
sans="font=DejaVu Sans:fontcolor=white"
mono="font=DejaVu Sans Mono:fontcolor=white"

# A chord is three quiet sines; it changes with st, fades in and out so that no change clicks.
chord="0.07*sin(min(1\,mod(t\,10)*2)*PI/2)*min(1\,(10-mod(t\,10))*2)"
root="st(0\,if(lt(t\,10)\,220\,if(lt(t\,20)\,174.61\,if(lt(t\,30)\,261.63\,196))))"
sound="$root;$chord*(sin(2*PI*ld(0)*t)+sin(2*PI*ld(0)*1.25*t)+sin(2*PI*ld(0)*1.5*t))"

ffmpeg -hide_banner -loglevel warning -y \
  -f lavfi -i "gradients=s=1280x720:r=25:d=$seconds:c0=0x12324a:c1=0x1f6f78:c2=0x3b2a5c:nb_colors=3:x0=0:y0=0:x1=1280:y1=720:speed=0.004:seed=23" \
  -f lavfi -i "color=c=0xffc857:s=1120x16:r=25:d=$seconds" \
  -f lavfi -i "aevalsrc='$sound':s=44100:d=$seconds" \
  -filter_complex "
    [0:v] drawbox=x=80:y=560:w=1120:h=16:color=black@0.45:t=fill [ground];
    [1:v] format=yuva420p, geq=lum='p(X,Y)':cb='p(X,Y)':cr='p(X,Y)':a='255*lte(X\,1120*T/$seconds)' [bar];
    [ground][bar] overlay=x=80:y=560,
      drawtext=$sans:fontsize=40:x=80:y=80:text='A clip to play and to scrub',
      drawtext=$mono:fontsize=190:x=(w-tw)/2:y=230:text='%{pts\:gmtime\:0\:%M\\\\\:%S}',
      drawtext=$mono:fontsize=44:x=(w-tw)/2:y=450:text='frame %{eif\:n\:d\:4} of $((seconds * 25))',
      drawtext=$mono:fontsize=32:x=80:y=600:text='0 s',
      drawtext=$mono:fontsize=32:x=360-tw/2:y=600:text='10',
      drawtext=$mono:fontsize=32:x=640-tw/2:y=600:text='20',
      drawtext=$mono:fontsize=32:x=920-tw/2:y=600:text='30',
      drawtext=$mono:fontsize=32:x=1200-tw:y=600:text='40 s',
      format=yuv420p [picture]" \
  -map "[picture]" -map 2:a -t "$seconds" \
  -c:v libx264 -profile:v main -preset veryslow -tune animation -crf 25 -maxrate 260k -bufsize 520k \
  -g 50 -keyint_min 50 -sc_threshold 0 -threads 1 \
  -c:a aac -b:a 48k -ac 1 \
  -map_metadata -1 -fflags +bitexact -flags:v +bitexact -flags:a +bitexact -movflags +faststart \
  clip.mp4
